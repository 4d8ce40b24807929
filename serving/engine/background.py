"""What a step, or the event loop, must not wait for: done by a thread."""

import asyncio
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


async def off_loop(work: Callable[[], T]) -> T:
    """The result of `in_background`, awaited. The loop's own threads would be waited for when the process is to end."""
    return await asyncio.wrap_future(in_background(work))
