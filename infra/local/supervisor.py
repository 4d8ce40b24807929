"""The process that owns everything: `python -m infra.local.supervisor STATE_DIR`, started by `client.up`, detached.

It reconciles the manifests that an `up` sends with what runs, and outlives that `up` once everything is up. While an
`up` is attached and goes away, by Ctrl-C or kill -9, everything stops: its socket tells.
"""

import asyncio
import copy
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.local.addresses import AddressBook, why_not_free
from infra.local.deployments import DeploymentController
from infra.local.jobs import JobController
from infra.local.locks import lock
from infra.local.objects import UNSUPPORTED, Json, ManifestError, Manifests, Workload, digest, entries, name_of
from infra.local.plan import Planner
from infra.local.pod import LONGEST_GRACE_S
from infra.local.processes import STATE_MARK, Reaper, kill_marked
from infra.local.secrets import Secrets
from infra.local.status import Status, WorkloadStatus, write_atomically

_NOBODY_CAME_S = 15.0
_STATUS_EVERY_S = 0.2
_LONGEST_REQUEST_BYTES = 64 * 2**20
_LONGEST_BACKLOG_BYTES = 2**20

Controller = JobController | DeploymentController


class Supervisor:
    """Holds the controllers, and is the `Host` that they and their pods see."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.logs_dir = state_dir / "logs"
        self.reaper = Reaper()
        self.grace_s: float | None = None
        self._book = AddressBook()
        self.planner = Planner(manifests=Manifests(()), book=self._book, state_dir=state_dir)
        self._secrets: Secrets | None = None
        self._running: dict[str, tuple[Controller, asyncio.Task[None]]] = {}
        self._withdrawn: list[WorkloadStatus] = []  # by the last `up`, which failed
        self._warnings: list[str] = []
        self._changed = asyncio.Event()  # for the attached `up`
        self._stale = asyncio.Event()  # for status.json
        self._stop = asyncio.Event()
        self._attached: asyncio.StreamWriter | None = None

    # What controllers and pods see (Host)

    def changed(self) -> None:
        self._changed.set()
        self._stale.set()
        for controller, _ in self._running.values():
            if isinstance(controller, DeploymentController):
                controller.wake()
            for pod in controller.pods:
                pod.write_endpoints()

    def logged(self, *, workload: str, pod: str, container: str, event: Json) -> None:
        self._send({"type": "log", "workload": workload, "pod": pod, "container": container, "event": event})

    def addresses(self, namespace: str) -> Callable[[str, int], list[int] | None]:
        def ports(host: str, port: int) -> list[int] | None:
            found = self._book.endpoints(host, port, namespace=namespace)
            if not found:
                return None
            return [
                self._book.ports(workload, pod.plan.slot)[number]
                for workload, number, slot in found
                if workload.key in self._running
                for pod in self._running[workload.key][0].pods
                if pod.ready and slot in (None, pod.plan.slot)
            ]

        return ports

    # The process

    async def run(self) -> None:
        """Serve until told to stop, by the socket, a signal, or the end of an attached `up`; then leave nothing."""
        loop = asyncio.get_running_loop()
        self.reaper.install()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        # A path of a socket is at most about 100 bytes, which a state directory may exceed.
        meeting = Path(tempfile.mkdtemp(prefix="slipway-"))
        try:
            server = await asyncio.start_unix_server(self._attend, meeting / "s", limit=_LONGEST_REQUEST_BYTES)
            identity = {"pid": os.getpid(), "socket": str(meeting / "s")}
            write_atomically(self.state_dir / "supervisor.json", json.dumps(identity))
            writing = asyncio.create_task(self._write_status())
            loop.call_later(_NOBODY_CAME_S, self._leave_if_idle)
            await self._stop.wait()
            server.close()
            shutil.rmtree(meeting, ignore_errors=True)
            await self._stop_everything()
            writing.cancel()
            self._save_status()
            self._send({"type": "stopped"})
        finally:
            shutil.rmtree(meeting, ignore_errors=True)
            kill_marked(STATE_MARK, str(self.state_dir))

    def _leave_if_idle(self) -> None:
        if not self._running and self._attached is None:
            self._stop.set()

    async def _stop_everything(self) -> None:
        """Every grace period is cut to one bound, and preStop is left out: nothing routes to a pod that all else leaves with."""
        self.grace_s = LONGEST_GRACE_S
        await self._cancel(list(self._running))

    async def _cancel(self, keys: list[str]) -> None:
        tasks = [self._running[key][1] for key in keys]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LONGEST_GRACE_S + 5 if self.grace_s else None)

    # Requests

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: {"op": "up", "objects": […], "secrets": {…}} or {"op": "stop"}; answers are JSON objects, one a line."""
        try:
            request: Json = json.loads(await reader.readline() or b"{}")
            if request.get("op") == "stop":
                self._stop.set()
                await reader.read()  # until this process ends, or the caller has gone
            elif request.get("op") == "up" and not self._stop.is_set():
                self._attached = writer
                kept: Json | None = request.get("secrets")
                self._secrets = Secrets(Path(kept["directory"]), kept["command"]) if kept else None
                await self._up(Manifests(tuple(request["objects"])), gone=asyncio.create_task(reader.read()))
        finally:
            if not self._stop.is_set():
                self._attached = None
                writer.close()

    async def _up(self, manifests: Manifests, *, gone: asyncio.Task[bytes]) -> None:
        """Apply the manifests and tell of the progress until all is settled, something has failed, or nobody listens."""
        try:
            started = await self._apply(manifests)
        except ManifestError as error:
            self._refuse(str(error), code=2)
            return
        told = ""
        while True:
            self._changed.clear()
            status = self.status().model_dump_json()
            if status != told:
                told = status
                self._send({"type": "status", "status": json.loads(status)})
            failed = self._failure()
            if failed:
                await self._withdraw(started)
                self._refuse(*failed)
                return
            if all(controller.settled for controller, _ in self._running.values()):
                self._save_status()
                self._attached, writer = None, self._attached
                self._send({"type": "settled"}, to=writer)
                gone.cancel()
                return
            changing = asyncio.create_task(self._changed.wait())
            await asyncio.wait({gone, changing}, return_when="FIRST_COMPLETED")
            changing.cancel()
            if gone.done() or self._stop.is_set():
                self._stop.set()
                return
            await asyncio.sleep(0.05)

    def _failure(self) -> tuple[str, int] | None:
        for controller, _ in self._running.values():
            if isinstance(controller, JobController) and controller.failed:
                return str(controller.failed), controller.failed.code
            if isinstance(controller, DeploymentController) and controller.failed:
                return controller.failed
        return None

    async def _withdraw(self, started: set[str]) -> None:
        """Stop what this `up` has started, so that nothing half-done stays; what is complete, logs and volumes do."""
        keys = [key for key in self._running if key in started and not self._is_complete(key)]
        self._withdrawn = [
            w.model_copy(update={"pods": [], "ready": 0, "state": "Failed" if w.state == "Failed" else "Stopped"})
            for w in self.status().workloads
            if f"{w.kind}/{w.name}" in keys
        ]
        await self._cancel(keys)
        for key in keys:
            del self._running[key]
        self._save_status()

    def _is_complete(self, key: str) -> bool:
        controller = self._running[key][0]
        return isinstance(controller, JobController) and controller.complete

    def _refuse(self, message: str, code: int) -> None:
        """Tell why, and go when nothing that runs is to be kept."""
        stopping = all(map(self._is_complete, self._running))
        self._send({"type": "failed", "message": message, "code": code, "stopping": stopping})
        if stopping:
            self._stop.set()

    def _send(self, message: dict[str, Any], *, to: asyncio.StreamWriter | None = None) -> None:
        writer = to or self._attached
        if writer is None or writer.is_closing():
            return
        # A caller that does not read loses log events, never memory of this process.
        if message["type"] != "log" or writer.transport.get_write_buffer_size() < _LONGEST_BACKLOG_BYTES:
            writer.write(json.dumps(message).encode() + b"\n")

    # Reconciling

    async def _apply(self, manifests: Manifests) -> set[str]:
        """Make what runs as the manifests say, touching nothing else. Returns the workloads that are started.

        Raises ManifestError, having changed nothing, when the manifests cannot run here.
        """
        book, planner = self._planned(manifests)
        done = self._completed_jobs(manifests)
        wanted = {w.key: w for w in manifests.workloads}
        stale = [key for key in self._running if key not in wanted or self._starts_again(key, wanted[key])]
        self._book, self.planner, self._withdrawn = book, planner, []
        await self._cancel(stale)
        for key in stale:
            del self._running[key]
        if self._stop.is_set():
            return set()
        self._warnings = [
            f"{o['kind']}/{name_of(o)} is not run on one machine" for o in manifests.objects if o["kind"] in UNSUPPORTED
        ]
        started: set[str] = set()
        for key, workload in wanted.items():
            published = book.published.get(key, {})
            controller = self._running[key][0] if key in self._running else None
            if isinstance(controller, DeploymentController):
                controller.update(workload, published=published)
            elif controller is None:
                started.add(key)
                if workload.kind == "Job":
                    controller = JobController(workload, host=self, complete=key in done)
                else:
                    controller = DeploymentController(workload, host=self, published=published)
                self._running[key] = (controller, asyncio.create_task(controller.run(), name=key))
        return started

    def _planned(self, manifests: Manifests) -> tuple[AddressBook, Planner]:
        """The addresses and the planner of new manifests, after every workload has been planned once."""
        book = copy.deepcopy(self._book)
        book.update(manifests)
        before = {port for ports in self._book.published.values() for port in ports.values()}
        taken: dict[int, str] = {}
        for key, ports in book.published.items():
            for port in ports.values():
                why = None if port in before else why_not_free(port)
                if taken.setdefault(port, key) != key:
                    why = f"port {port} publishes {taken[port]} already"
                if why:
                    raise ManifestError(f"{why} ({key} is published there). Stop what holds it, or change the port")
        planner = Planner(manifests=manifests, book=book, state_dir=self.state_dir, secrets=self._secrets)
        for workload in manifests.workloads:
            planner.pod(workload, 0)
        return book, planner

    def _starts_again(self, key: str, workload: Workload) -> bool:
        """A Job that failed, or that is under way from another template: Jobs cannot be updated, only made anew."""
        controller = self._running[key][0]
        if not isinstance(controller, JobController) or controller.complete:
            return False
        return controller.failed is not None or digest(controller.workload.template) != digest(workload.template)

    def _completed_jobs(self, manifests: Manifests) -> set[str]:
        """The Jobs, by name, that were complete before and whose claims are still here: they are not run again."""
        try:
            remembered = set[str](json.loads((self.state_dir / "jobs.json").read_text())["complete"])
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, KeyError, TypeError):
            print("jobs.json cannot be read: every Job is run again", flush=True)
            return set()
        return {w.key for w in manifests.workloads if w.key in remembered and all(p.is_dir() for p in self._claims(w))}

    def _claims(self, workload: Workload) -> list[Path]:
        volumes = entries(workload.pod_spec, "volumes")
        claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v]
        return [self.state_dir / "volumes" / claim for claim in claims]

    # Telling

    def status(self) -> Status:
        workloads: list[WorkloadStatus] = []
        for key, (controller, _) in self._running.items():
            ports = list(self._book.published.get(key, {}).values())
            url = f"http://127.0.0.1:{ports[0]}" if ports else None
            workloads.append(controller.status().model_copy(update={"url": url}))
        return Status(running=True, pid=os.getpid(), workloads=[*workloads, *self._withdrawn], warnings=self._warnings)

    def _save_status(self) -> None:
        write_atomically(self.state_dir / "status.json", self.status().model_dump_json(indent=1))
        complete = sorted(filter(self._is_complete, self._running))
        write_atomically(self.state_dir / "jobs.json", json.dumps({"complete": complete}))

    async def _write_status(self) -> None:
        """Write status.json after changes, a few times a second at most."""
        while True:
            await self._stale.wait()
            self._stale.clear()
            self._save_status()
            await asyncio.sleep(_STATUS_EVERY_S)


def main() -> int:
    state_dir = Path(sys.argv[1])
    # Held until this process ends: it is how others know that it lives.
    if lock(state_dir / "supervisor.lock", wait_s=2) is None:
        print(f"error: another supervisor runs ({state_dir}). Stop it with `slipway local down`", file=sys.stderr)
        return 2
    asyncio.run(Supervisor(state_dir).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
