"""What a command line calls: `up`, `down`, `status`, `logs`, each on a state directory (`.slipway/<stack>`)."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import psutil

from infra.local.locks import is_held, lock
from infra.local.objects import Json, ManifestError, Manifests
from infra.local.plan import REPOSITORY
from infra.local.pod import LONGEST_GRACE_S
from infra.local.processes import STATE_MARK, kill_marked, marked
from infra.local.secrets import Secrets
from infra.local.status import Status, read_status

_START_S = 30.0
_STOP_S = LONGEST_GRACE_S + 15.0


class LocalError(Exception):
    """One line for stderr, `WHAT (WHERE). FIX`, and the exit code: 2 refused, 1 failed."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Event:
    """Progress of an `up`.

    `status`: `status` is new. `log`: a container wrote `event` (docs/contracts.md, "Log events"). `settled`: the last
    one, everything is up.
    """

    type: Literal["status", "log", "settled"]
    status: Status | None = None
    workload: str = ""  # Kind/name
    pod: str = ""
    container: str = ""
    event: Json | None = None


@dataclass(frozen=True)
class Down:
    """What a `down` found: whether a supervisor ran, and how many processes had to be killed after it."""

    was_running: bool
    killed: int


@dataclass(frozen=True)
class LogLine:
    pod: str
    container: str
    text: str


def up(manifests_dir: Path, state_dir: Path, *, secrets: Secrets | None = None) -> Generator[Event]:
    """Run the manifests, and tell of the progress until every Job is complete and every Deployment ready.

    `secrets` has what the manifests name and do not hold.

    Then they keep running without the caller. When the iteration ends earlier (Ctrl-C, `close()`, the caller's death),
    everything is stopped. Iterate under `contextlib.closing`, so that the caller waits for that.

    Raises LocalError: refused (2) for manifests that cannot run here, ports in use, another `up` under way; failed (1,
    or 2 when a container refused its input) when a Job has failed for good, after what this `up` started was stopped.
    """
    try:
        manifests = Manifests.load(manifests_dir)
    except ManifestError as error:
        raise LocalError(str(error), exit_code=2) from None
    state_dir = state_dir.resolve()
    with _alone(state_dir):
        finished = False
        try:
            kept = {"directory": str(secrets.directory), "command": secrets.command} if secrets else None
            with _request(state_dir, {"op": "up", "objects": manifests.objects, "secrets": kept}) as answers:
                for answer in answers:
                    match answer["type"]:
                        case "status":
                            yield Event("status", status=Status.model_validate(answer["status"]))
                        case "log":
                            yield Event(**answer)
                        case "settled":
                            finished = True
                            yield Event("settled", status=status(state_dir))
                            return
                        case "failed":
                            finished = not answer["stopping"]
                            raise LocalError(answer["message"], exit_code=answer["code"])
                        case _:
                            raise LocalError(f"stopped by a `down` ({state_dir})", exit_code=1)
            log = state_dir / "supervisor.log"
            raise LocalError(f"the supervisor ended ({log} tells why). Run `up` again", exit_code=1)
        finally:
            if not finished:
                _stop(state_dir)


def down(state_dir: Path, *, purge: bool = False) -> Down:
    """Stop everything that any `up` on this state directory has started, whatever state it is in; idempotent.

    `purge` also removes the directory: volumes, logs and what is remembered. Raises LocalError (2) when `purge` is asked
    for a directory that no `up` has made, (1) when an `up` goes on in spite of it.
    """
    state_dir = state_dir.resolve()
    # Manifests are rendered there before the first `up`: a directory with nothing else is a stack's as well.
    foreign = state_dir.exists() and {p.name for p in state_dir.iterdir()} - {"manifests"}
    if purge and foreign and not (state_dir / "up.lock").exists():
        raise LocalError(f"no state of a stack ({state_dir}). Name the directory that `up` was given", exit_code=2)
    found = _stop(state_dir)
    if state_dir.exists():
        # An `up` that was attached sees its supervisor go, and ends; one that began just now is stopped as well.
        until = time.monotonic() + _STOP_S
        while (handle := lock(state_dir / "up.lock", wait_s=0.2)) is None:
            again = _stop(state_dir)
            found = Down(found.was_running or again.was_running, found.killed + again.killed)
            if time.monotonic() > until:
                raise LocalError(f"another `up` or `down` does not end ({state_dir}). Stop it", exit_code=1)
        if purge:
            shutil.rmtree(state_dir)
        os.close(handle)
    return found


def status(state_dir: Path) -> Status:
    """What runs now. Without a supervisor nothing does: then what was not complete is told of as Stopped."""
    state_dir = state_dir.resolve()
    last = read_status(state_dir / "status.json")
    if _is_running(state_dir):
        return last
    workloads = [
        w if w.state in ("Complete", "Failed") else w.model_copy(update={"state": "Stopped", "reason": "", "ready": 0})
        for w in last.workloads
    ]
    workloads = [w.model_copy(update={"pods": []}) for w in workloads]
    return Status(running=False, workloads=workloads, warnings=last.warnings)


def logs(state_dir: Path, name: str, *, follow: bool = False) -> Iterator[LogLine]:
    """The lines of the containers of a workload or a pod called `name`, one file after another; with `follow`, for ever.

    Raises LocalError (2) when nothing of that name has logs.
    """
    directory = state_dir.resolve() / "logs"
    pods = sorted(p.name for p in directory.iterdir() if p.is_dir()) if directory.is_dir() else []
    chosen = [p for p in pods if p == name or p.rpartition("-")[0] == name]
    if not chosen:
        known = ", ".join(sorted({p.rpartition("-")[0] for p in pods})) or "nothing has run yet"
        raise LocalError(f"no logs of {name!r} ({directory}). Choose one of: {known}", exit_code=2)
    offsets: dict[Path, int] = {}
    while True:
        for pod in chosen:
            for path in sorted((directory / pod).glob("*.log")):
                yield from _new_lines(path, pod, offsets)
        if not follow:
            return
        time.sleep(0.2)


def _new_lines(path: Path, pod: str, offsets: dict[Path, int]) -> Iterator[LogLine]:
    """Whole lines since the last look; of the file before as well at the first, and from the start after a rotation."""
    before = path.with_suffix(".log.1")
    if path not in offsets and before.exists():
        for line in before.read_text(encoding="utf-8", errors="replace").splitlines():
            yield LogLine(pod, path.stem, line)
    with path.open("rb") as file:
        if path.stat().st_size >= offsets.get(path, 0):
            file.seek(offsets.get(path, 0))
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        offsets[path] = file.tell() - len(data) + len(whole)
    for line in whole.decode(errors="replace").splitlines():
        yield LogLine(pod, path.stem, line)


@contextlib.contextmanager
def _alone(state_dir: Path) -> Generator[None]:
    """Hold the state directory against another `up`; the kernel lets go of it however this process ends."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        state_dir.chmod(0o700)  # files of Secrets lie here while pods run
        handle = lock(state_dir / "up.lock")
    except OSError as error:
        raise LocalError(f"cannot write: {error.strerror} ({state_dir}). Make it writable", exit_code=2) from None
    if handle is None:
        raise LocalError(f"another `up` is under way ({state_dir}). Wait for it, or stop it with `down`", exit_code=2)
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _request(state_dir: Path, request: Json) -> Generator[Iterator[Json]]:
    """Send one request to the supervisor, started where none runs, and hand on its answers until it hangs up."""
    connection = _connect(state_dir)
    if connection is None:
        # None runs, or one that is about to end.
        _stop(state_dir)
        connection = _start(state_dir)
    with connection, connection.makefile("rb") as lines:
        connection.sendall(json.dumps(request).encode() + b"\n")
        yield (cast("Json", json.loads(line)) for line in lines)


def _start(state_dir: Path) -> socket.socket:
    """Start a supervisor in a session of its own, and connect to it."""
    with (state_dir / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "infra.local.supervisor", str(state_dir)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), STATE_MARK: str(state_dir)},
            cwd=state_dir,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        if _identity(state_dir).get("pid") == process.pid and (connection := _connect(state_dir)):
            return connection
        time.sleep(0.02)
    raise LocalError(f"the supervisor did not start ({state_dir / 'supervisor.log'} tells why)", exit_code=1)


def _connect(state_dir: Path) -> socket.socket | None:
    """A connection to the supervisor that runs on this directory; None when none answers."""
    path = _identity(state_dir).get("socket")
    if path is None or not _is_running(state_dir):
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection


def _identity(state_dir: Path) -> Json:
    """The pid and the socket of the last supervisor; {} when unknown."""
    try:
        identity = json.loads((state_dir / "supervisor.json").read_text())
    except (OSError, ValueError):
        return {}
    return cast("Json", identity) if isinstance(identity, dict) else {}


def _is_running(state_dir: Path) -> bool:
    return is_held(state_dir / "supervisor.lock")


def _stop(state_dir: Path) -> Down:
    """Ask the supervisor to stop everything gracefully; then kill whatever of this stack is left."""
    was_running = _is_running(state_dir)
    connection = _connect(state_dir) if was_running else None
    if connection:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_STOP_S)
            connection.sendall(b'{"op": "stop"}\n')
            while connection.recv(2**16):
                pass
    _end_supervisors(state_dir)
    killed = kill_marked(STATE_MARK, str(state_dir))
    shutil.rmtree(state_dir / "pods", ignore_errors=True)  # files of Secrets, when a supervisor was killed
    socket_path = _identity(state_dir).get("socket")
    if socket_path:
        # Left by a supervisor that was killed.
        shutil.rmtree(Path(socket_path).parent, ignore_errors=True)
        (state_dir / "supervisor.json").unlink(missing_ok=True)
    return Down(was_running=was_running, killed=killed)


def _end_supervisors(state_dir: Path) -> None:
    """Wait for the one that was asked to stop; one whose socket or state directory was removed stops by this signal."""
    ending: list[psutil.Process] = []
    for process in marked(STATE_MARK, str(state_dir)):
        with contextlib.suppress(psutil.Error):
            if "infra.local.supervisor" in process.cmdline():
                process.terminate()
                ending.append(process)
    psutil.wait_procs(ending, timeout=_STOP_S)
