"""A rank that hangs ends, and says where it hung.

A collective that one rank never enters holds all the others for ever. Every rank sets itself an alarm at each step; when
no step has ended in time, Python's fault handler writes the stacks of all threads and ends the process, even where the
interpreter is stuck inside a library. torchrun then starts all ranks again, from the newest checkpoint.
"""

import faulthandler
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

STARTING = 5.0
"""Times as long as a step may take it to join, load, compile and make the first one."""


class Watchdog:
    """An alarm that `beat` puts off. The stacks go to `run/stacks/rank-N.txt`, which is not there where nothing hung."""

    def __init__(self, run: Path, *, rank: int, timeout_s: float) -> None:
        self._path, self._timeout_s = run / "stacks" / f"rank-{rank:05d}.txt", timeout_s
        self._file: TextIO | None = None
        self._due_s = 0.0

    def __enter__(self) -> "Watchdog":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        self.beat(patience=STARTING)
        return self

    def beat(self, *, patience: float = 1.0) -> None:
        """Now is a sign of life; the next is due in the time-out, `patience` times over where more is to be done.

        To set the alarm takes a thread, and a busy machine milliseconds: within a twentieth of the time-out it stays as it is.
        """
        assert self._file is not None
        due_s = time.monotonic() + self._timeout_s * patience
        if abs(due_s - self._due_s) < self._timeout_s / 20:
            return
        self._due_s = due_s
        faulthandler.dump_traceback_later(self._timeout_s * patience, exit=True, file=self._file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        assert self._file is not None
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()
        with suppress(OSError):  # another rank's stacks are in it, or the last of them has removed it
            self._path.parent.rmdir()


def earlier_hangs(run: Path) -> list[Path]:
    """Stacks that an earlier start of this run left behind."""
    return [path for path in sorted((run / "stacks").glob("rank-*.txt")) if path.stat().st_size]
