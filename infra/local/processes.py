"""Starting a process, knowing when it ends, and ending all that it started.

A container's processes are found by an environment variable that children inherit: torchrun's ranks, for one, live in
sessions of their own and outlive a launcher that is killed.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

STATE_MARK = "SLIPWAY_LOCAL"  # the state directory
CONTAINER_MARK = "SLIPWAY_LOCAL_CONTAINER"  # one run of one container
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOG_BYTES = 4 * 2**20  # of one container's log, twice: the present file and the one before

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Reaper:
    """Tells when child processes end, by SIGCHLD: no thread per process, and no fork beside running threads."""

    def __init__(self) -> None:
        self._waiting: dict[subprocess.Popen[bytes], asyncio.Future[int]] = {}

    def install(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    async def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Its exit code, negative for a signal."""
        future = self._waiting.get(process)
        if future is None:
            future = self._waiting[process] = asyncio.get_running_loop().create_future()
            self._reap()
        return await asyncio.shield(future)

    def _reap(self) -> None:
        for process in [p for p in self._waiting if p.poll() is not None]:
            future = self._waiting.pop(process)
            if not future.done():
                future.set_result(process.returncode)


def spawn(argv: list[str], *, env: dict[str, str], cwd: Path, output: int | None = None) -> subprocess.Popen[bytes]:
    """Start `argv` in a session of its own, writing to the file descriptor `output`. Raises OSError."""
    sink = subprocess.DEVNULL if output is None else output
    return subprocess.Popen(  # noqa: S603 - to run what the manifests say is the whole purpose
        argv,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=sink,
        start_new_session=True,
        # Safe beside asyncio as this process has one thread; the parent's death is noticed even when it is kill -9.
        preexec_fn=_die_with_parent if _libc else None,
    )


def _die_with_parent() -> None:
    if _libc:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def marked(name: str, value: str) -> Iterator[psutil.Process]:
    """The processes of this user that carry an environment variable, but for this one."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(name) == value:
                yield process


def kill_marked(name: str, value: str) -> int:
    """SIGKILL them until none is left, as one that is being killed may fork; returns how many there were."""
    killed: set[int] = set()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        found = [p for p in marked(name, value) if p.status() != psutil.STATUS_ZOMBIE]
        if not found:
            break
        for process in found:
            killed.add(process.pid)
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=0.2)
    return len(killed)


class Output:
    """The pipe that a container writes to: copied to its log file, and handed on line by line."""

    def __init__(self, path: Path, on_line: Callable[[str], None]) -> None:
        self._path = path
        self._on_line = on_line
        path.parent.mkdir(parents=True, exist_ok=True)

    async def open(self) -> int:
        """Begin to copy; returns the end to write to, which the caller closes once a process has it."""
        reading, writing = os.pipe()
        loop = asyncio.get_running_loop()
        stream = asyncio.StreamReader()
        self._transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb", 0)
        )
        self._copying = asyncio.create_task(self._copy(stream))
        return writing

    async def close(self) -> None:
        """Take what is still in the pipe. Every process of the container has ended."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._copying, timeout=2)
        self._transport.close()

    async def _copy(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self._path.open("ab", buffering=0))
            while chunk := await stream.read(2**16):
                if file.tell() + len(chunk) > _LOG_BYTES:
                    stack.pop_all().close()
                    self._path.replace(self._path.with_suffix(".log.1"))
                    file = stack.enter_context(self._path.open("ab", buffering=0))
                file.write(chunk)
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._on_line(line.decode(errors="replace").rstrip("\r"))
                # A line without an end is cut, so that memory is bounded.
                rest = rest[-(2**20) :]
        if rest:
            self._on_line(rest.decode(errors="replace"))
