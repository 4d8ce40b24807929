"""What a step must not wait for: done by a thread, and taken in between steps."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from serving.engine.child import NICE

T = TypeVar("T")


def be_patient() -> None:
    """Takes this thread behind all others. Where threads have no priority of their own it stays where it is."""
    if sys.platform == "linux":
        os.nice(NICE)  # which there is the calling thread's


def in_background(work: Callable[[], T]) -> "Future[T]":
    """A thread's result. One that never ends, as of a disk that never answers, does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
