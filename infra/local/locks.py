"""Locks that the kernel lets go of however their holder ends: no stale file or reused pid can block anyone."""

import contextlib
import fcntl
import os
import time
from collections.abc import Generator
from pathlib import Path


def lock(path: Path, *, wait_s: float = 0.0) -> int | None:
    """Hold `path` for this process alone; None when another has it. The kernel lets go of it at any death."""
    until = time.monotonic() + wait_s
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A purge may have removed the file in between: then this lock is on nothing.
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        os.close(handle)
        if time.monotonic() >= until:
            return None
        time.sleep(0.02)


@contextlib.contextmanager
def held(path: Path, *, wait_s: float = 0.0) -> Generator[bool]:
    """`lock` for as long as the block runs; False when another has it."""
    handle = lock(path, wait_s=wait_s)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock."""
    if not path.exists():
        return False
    handle = lock(path)
    if handle is not None:
        os.close(handle)
    return handle is None
