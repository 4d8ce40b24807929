"""One run, one trainer: whoever is given the directory of a run that goes on waits until it ends, and does not mix in."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import Failed, Interrupted, StopSignal
from trainer.log import Log

PATIENCE_S = 60.0
"""A trainer that was told to go is still writing its checkpoint when the next one starts."""
_ASK_AGAIN_S = 0.2


@contextmanager
def alone_with(run: Path, *, stop: StopSignal, log: Log) -> Iterator[None]:
    """Holds a lock on the directory, which ends with the process at the latest.

    Raises Failed where another has it for longer than PATIENCE_S, Interrupted when `stop` was received meanwhile. File
    systems without locks (some of networks and object stores) hold nobody off.
    """
    handle = os.open(run, os.O_RDONLY)
    try:
        _wait_for_lock(handle, run, stop=stop, log=log)
        yield
    finally:
        os.close(handle)


def _wait_for_lock(handle: int, run: Path, *, stop: StopSignal, log: Log) -> None:
    until_s, told = time.monotonic() + PATIENCE_S, False
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if stop.received is not None:
                raise Interrupted("stopped while another process trained this run") from None
            if time.monotonic() >= until_s:
                fix = "Wait until it has ended, or give run= another place."
                raise Failed("another process is training this run", where=str(run), fix=fix) from None
        except OSError:
            return None
        if not told:
            log.emit("waiting", path=str(run), message="another process is training this run")
            told = True
        time.sleep(_ASK_AGAIN_S)
