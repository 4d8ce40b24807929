"""Large requests are read by a process of low priority, one after another, where reading them holds up nobody.

Reading a JSON of a million values holds Python's lock all the while: done by the server, or by a thread of it, that
would stop every stream. The process is started by the first request that needs it, has a bounded memory, and is
replaced when a request was more than that.
"""

import asyncio
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TypeVar

from pydantic import BaseModel

from serving.api.errors import ApiError
from serving.api.protocol import parse
from serving.engine import child

INLINE_VALUES = 8_192  # of a JSON text, that the server reads itself: a millisecond or two
MOST_WAITING = 16
MEMORY_BYTES = 1 << 30
R = TypeVar("R", bound=BaseModel)


class Clerk:
    def __init__(self) -> None:
        self._desk = ThreadPoolExecutor(1, "clerk")  # whose thread waits for the process, and makes the others wait
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._waiting = 0

    async def read(self, kind: type[R], body: bytes) -> R:
        """The request in `body`. Raises `ApiError`: 400 for what is wrong with it, 413 or 429 for what is too much."""
        if body.count(b",") < INLINE_VALUES:  # without commas there are few values, however long they are
            return parse(kind, body)
        if self._waiting == MOST_WAITING:
            raise ApiError(
                429, "Many large requests are waiting; try again", code="rate_limit_exceeded", retry_after_s=2
            )
        self._waiting += 1
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._desk, self._ask, kind, body)
        finally:
            self._waiting -= 1
        if isinstance(found, ApiError):
            raise found
        return found

    def close(self) -> None:
        self._desk.shutdown(wait=False, cancel_futures=True)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ask(self, kind: type[R], body: bytes) -> R | ApiError:
        if self._connection is None:
            self._process, self._connection = child.start("serving.clerk")
        try:
            self._connection.send((kind, body))
            return self._connection.recv()
        except (EOFError, OSError):
            assert self._process is not None
            self._process.wait()
            self._connection = None
            return ApiError(413, "The body is more than can be read", code="request_too_large")


def main() -> None:
    child.ignore_signals()
    connection = Connection(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    os.nice(child.NICE)  # only now: whoever sent the first request need not wait for a slow start
    while True:
        try:
            kind, body = connection.recv()
        except (EOFError, OSError):
            return
        try:
            found = parse(kind, body)
        except ApiError as error:
            found = error
        except MemoryError:
            found = ApiError(413, "The body is more than can be read", code="request_too_large")
        connection.send(found)


if __name__ == "__main__":
    main()
