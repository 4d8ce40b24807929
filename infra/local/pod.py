"""One pod: init containers one after another, then the containers, each kept running by the restart policy."""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from infra.local.objects import Json
from infra.local.plan import ContainerPlan, Planner, PodPlan
from infra.local.probes import Prober, kill_group, run_to_end
from infra.local.processes import CONTAINER_MARK, Output, Reaper, kill_marked, spawn
from infra.local.status import PodStatus, write_atomically

# Kubernetes waits 10 s, 20 s, 40 s … up to 5 min. Someone waits at this machine, and nothing shares it: less does.
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 60.0
LONGEST_GRACE_S = 30.0  # of any pod, when the whole stack stops
_FORGIVEN_AFTER_S = 600.0  # a container that ran for so long starts again without delay, as in Kubernetes


class Host(Protocol):
    """What pods and controllers need of the supervisor."""

    reaper: Reaper
    planner: Planner
    logs_dir: Path
    grace_s: float | None  # set when the whole stack stops: the longest grace period, and no preStop

    def changed(self) -> None:
        """Something that status.json or an endpoint file tells is different now."""

    def logged(self, *, workload: str, pod: str, container: str, event: Json) -> None:
        """A container wrote a log event."""

    def addresses(self, namespace: str) -> Callable[[str, int], list[int] | None]:
        """The ports of the ready pods behind a Service's name, seen from a namespace."""
        ...


@dataclass
class ContainerState:
    plan: ContainerPlan
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    reason: str = "waiting to start"
    restarts: int = 0
    exit_code: int | None = None
    last_error: str = ""
    tail: deque[str] = field(default_factory=lambda: deque[str](maxlen=20))


@dataclass(frozen=True)
class PodExit:
    """How a pod ended: the exit code of each container that ended, and what to tell a person."""

    codes: dict[str, int]
    why: str

    @property
    def code(self) -> int:
        """The first code that is not 0, else 0."""
        return next((code for code in self.codes.values() if code), 0)


def back_off_s(failures: int) -> float:
    """The delay before another try after `failures` ≥ 1 in a row."""
    return min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2 ** min(failures - 1, 20))


class Pod:
    """`run` it in a task; `stop` ends it as Kubernetes does (preStop, SIGTERM, grace, SIGKILL)."""

    def __init__(self, plan: PodPlan, *, template: str, host: Host) -> None:
        self.plan = plan
        self.template = template  # digest of the pod template it was made from
        self._host = host
        self._init = [ContainerState(c) for c in plan.init]
        self._containers = [ContainerState(c) for c in plan.containers]
        self._stopping = False
        self._exit: PodExit | None = None
        self._task: asyncio.Task[PodExit] | None = None

    # What others see

    @property
    def ready(self) -> bool:
        return not self._stopping and all(c.ready for c in self._containers)

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def restarts(self) -> int:
        return sum(c.restarts for c in self._states)

    @property
    def _states(self) -> list[ContainerState]:
        return [*self._init, *self._containers]

    @property
    def failing(self) -> ContainerState | None:
        """A container that last ended with an error and is not running again."""
        return next((c for c in self._states if c.exit_code and c.process is None), None)

    def status(self) -> PodStatus:
        running = [c for c in self._states if c.process is not None]
        if self._exit is not None:
            state, reason = ("Failed", self._exit.why) if self._exit.code else ("Complete", "")
        elif self._stopping:
            state, reason = "Stopping", "stopping"
        elif self.ready:
            state, reason = "Ready", ""
        else:
            state = "Running" if any(c in running for c in self._containers) else "Waiting"
            reason = next((c.reason for c in self._states if not c.ready and c.reason), "")
        return PodStatus(
            name=self.plan.name,
            state=state,
            reason=reason,
            restarts=self.restarts,
            exit_code=self._exit.code if self._exit else next((c.exit_code for c in self._states if c.exit_code), None),
            pids=[c.process.pid for c in running if c.process],
            ports=self.plan.ports,
        )

    def describe(self, container: ContainerState) -> str:
        """Why a container ended: its last error event or line, else the last line that it wrote."""
        said = container.last_error or (container.tail[-1] if container.tail else "it wrote nothing")
        return f"container {container.plan.name} of {self.plan.name} exited {container.exit_code}: {said}"

    # Life

    def start(self) -> asyncio.Task[PodExit]:
        self._task = asyncio.create_task(self._run(), name=self.plan.name)
        return self._task

    def stop(self) -> None:
        if self._task and not self._stopping:
            self._stopping = True
            self._host.changed()  # endpoints first: nothing new is sent to a pod that is told to stop
            self._task.cancel()

    async def _run(self) -> PodExit:
        try:
            self._prepare()
            policy = self.plan.restart_policy
            for container in self._init:
                await self._keep(container, "Never" if policy == "Never" else "OnFailure")
                if container.exit_code:
                    break
            else:
                async with asyncio.TaskGroup() as group:
                    for container in self._containers:
                        group.create_task(self._keep(container, policy))
            ended = [c for c in self._states if c.exit_code is not None]
            failed = [self.describe(c) for c in ended if c.exit_code]
            self._exit = PodExit({c.plan.name: c.exit_code or 0 for c in ended}, failed[0] if failed else "")
            return self._exit
        finally:
            shutil.rmtree(self.plan.directory, ignore_errors=True)
            self._host.changed()

    def _prepare(self) -> None:
        """A fresh directory: an emptyDir begins empty, and files are as the ConfigMaps are now."""
        shutil.rmtree(self.plan.directory, ignore_errors=True)
        for directory in self.plan.directories:
            directory.mkdir(parents=True, exist_ok=True)
        for path, text in self.plan.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for path, target in self.plan.links.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)
        self.write_endpoints()

    def write_endpoints(self) -> None:
        """Bring the endpoint files of this pod's Envoy up to date; Envoy sees a file that is renamed into place."""
        addresses = self._host.addresses(self.plan.namespace)
        for file in self.plan.endpoint_files:
            text = file.render(addresses)
            if file.path.parent.is_dir() and not (file.path.exists() and file.path.read_text() == text):
                write_atomically(file.path, text)

    async def _keep(self, container: ContainerState, policy: str) -> None:
        """Run a container, again and again where the policy says so; its last exit code is in its state."""
        failures = 0
        while True:
            began = time.monotonic()
            container.exit_code = await self._run_once(container)
            if policy == "Never" or (policy == "OnFailure" and container.exit_code == 0):
                container.ready = container.exit_code == 0
                return
            failures = 1 if time.monotonic() - began > _FORGIVEN_AFTER_S else failures + 1
            delay_s = back_off_s(failures)
            container.reason = f"restarting in {delay_s:g} s: {self.describe(container)}"
            self._host.changed()
            await asyncio.sleep(delay_s)
            container.restarts += 1

    async def _run_once(self, container: ContainerState) -> int:
        """Run a container to its end, or until a probe or a cancellation stops it; nothing of it is left behind."""
        plan, mark = container.plan, f"{self.plan.name}/{container.plan.name}/{secrets.token_hex(8)}"
        env = plan.env | {CONTAINER_MARK: mark}
        container.tail.clear()
        container.last_error = ""
        path = self._host.logs_dir / self.plan.name / f"{plan.name}.log"
        output = Output(path, lambda line: self._on_line(container, line))
        writing = await output.open()
        try:
            process = container.process = spawn(plan.argv, env=env, cwd=plan.cwd, output=writing)
        except OSError as error:
            # 128 is what Kubernetes gives a container that could not be started.
            os.write(writing, f"error: cannot start {plan.argv[0]}: {error.strerror}\n".encode())
            process = None
        finally:
            os.close(writing)
        if process is None:
            await output.close()
            return 128
        kind = "init container " if container in self._init else ""
        command = " ".join([Path(plan.argv[0]).name, *plan.argv[1:6]])
        container.reason = f"{kind}{plan.name} is running: {command}"
        ended = asyncio.create_task(self._host.reaper.wait(process))
        prober = Prober(plan, env=env, reaper=self._host.reaper)
        probing = asyncio.create_task(prober.run(lambda ready, why: self._on_ready(container, ready, why)))
        if container in self._init:
            probing.cancel()
        self._host.changed()
        try:
            await asyncio.wait(
                {ended, probing} if container not in self._init else {ended}, return_when="FIRST_COMPLETED"
            )
            if not ended.done():
                self._on_line(container, f"error: {probing.result()}")
        finally:
            container.ready = False
            await self._terminate(plan, process, ended, env)
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)
            # With its first process a container ends: what that has started goes too.
            kill_group(process)
            kill_marked(CONTAINER_MARK, mark)
            await output.close()
            container.process = None
            self._host.changed()
        code = ended.result()
        return code if code >= 0 else 128 - code

    async def _terminate(
        self, plan: ContainerPlan, process: subprocess.Popen[bytes], ended: asyncio.Task[int], env: dict[str, str]
    ) -> None:
        """preStop, SIGTERM, and SIGKILL when the grace period, which counts from the preStop on, is over."""
        hurry_s = self._host.grace_s
        grace_s = self.plan.grace_s if hurry_s is None else min(self.plan.grace_s, hurry_s)
        until = time.monotonic() + grace_s
        if not ended.done() and hurry_s is None:
            if plan.pre_stop:
                with contextlib.suppress(TimeoutError, OSError):
                    async with asyncio.timeout(grace_s):
                        await run_to_end(plan.pre_stop, env=env, cwd=plan.cwd, reaper=self._host.reaper)
            elif plan.pre_stop_s:
                await asyncio.wait({ended}, timeout=min(plan.pre_stop_s, grace_s))
        if not ended.done():
            process.terminate()
            await asyncio.wait({ended}, timeout=max(0.0, until - time.monotonic()))
        if not ended.done():
            kill_group(process)
        await ended

    def _on_ready(self, container: ContainerState, ready: bool, why: str) -> None:
        if (container.ready, container.reason) != (ready, why):
            container.ready, container.reason = ready, why
            self._host.changed()

    def _on_line(self, container: ContainerState, line: str) -> None:
        container.tail.append(line)
        if line.startswith("error:"):
            container.last_error = line
        if not line.startswith("{"):
            return
        try:
            event = json.loads(line)
        except ValueError:
            return
        if "event" not in event:
            return
        if event["event"] == "error":
            container.last_error = f"error: {cast('Json', event).get('message', line)}"
        self._host.logged(
            workload=self.plan.workload, pod=self.plan.name, container=container.plan.name, event=cast("Json", event)
        )
