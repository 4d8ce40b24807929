"""Where blocks of keys and values go when the engine's own memory gives them up: a bounded memory, or Redis/Valkey.

A store maps a key (a block's chained hash, in its model's namespace) to the block's bytes, and may forget at any time.
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from serving.errors import Refused
from serving.reach import Reach

TIMEOUT_S = 0.25  # of Redis: a prompt is computed sooner than that
RETRY_S = 10.0
QUEUED_BLOCKS = 256  # on their way to Redis; more than these are dropped
EXPIRE_S = 24 * 3600


class BlockStore(Protocol):
    shared: bool  # with other replicas: blocks are stored as soon as they are full, since others may want them now

    @property
    def failures(self) -> int:
        """How often it did not answer."""
        ...

    def put(self, key: bytes, content: bytes) -> None: ...

    def get_first(self, keys: Sequence[bytes]) -> list[bytes]:
        """The contents of the first keys, up to the first that is not there."""
        ...


class MemoryStore:
    """The latest used blocks, up to `limit_bytes` of them."""

    shared, failures = False, 0

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._used_bytes = limit_bytes, 0
        self._contents: OrderedDict[bytes, bytes] = OrderedDict()

    def put(self, key: bytes, content: bytes) -> None:
        if key in self._contents:
            self._contents.move_to_end(key)
            return
        self._contents[key] = content
        self._used_bytes += len(content)
        while self._used_bytes > self._limit_bytes:
            _, oldest = self._contents.popitem(last=False)
            self._used_bytes -= len(oldest)

    def get_first(self, keys: Sequence[bytes]) -> list[bytes]:
        found = []
        for key in keys:
            content = self._contents.get(key)
            if content is None:
                break
            self._contents.move_to_end(key)
            found.append(content)
        return found


class RedisStore:
    """Blocks that all replicas of a model share. While Redis is away it is as if it were empty.

    What is in it is believed: only the replicas may be able to write there.
    """

    shared = True

    def __init__(self, url: str) -> None:
        try:
            import redis
        except ImportError:
            fix = "Install redis, or give a size to keep blocks in this machine's memory"
            raise Refused("the package redis is missing", where="--kv-spill", fix=fix) from None
        try:
            self._redis = redis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        except ValueError as error:
            raise Refused(str(error), where=f"--kv-spill {url}", fix="Give redis://HOST:PORT/DB") from None
        self._errors = (redis.RedisError, OSError)
        self._reach = Reach("kv_spill")
        self._away_until_s = 0.0
        self._outgoing: queue.Queue[tuple[bytes, bytes]] = queue.Queue(QUEUED_BLOCKS)
        threading.Thread(target=self._send, daemon=True).start()

    @property
    def failures(self) -> int:
        return self._reach.failures

    def put(self, key: bytes, content: bytes) -> None:
        """Hands the block to a thread: a step never waits for it, and a slow Redis costs blocks, not time."""
        try:
            self._outgoing.put_nowait((key, content))
        except queue.Full:
            return

    def get_first(self, keys: Sequence[bytes]) -> list[bytes]:
        if not keys or time.monotonic() < self._away_until_s:
            return []
        try:
            contents = self._redis.mget([*keys])
        except self._errors as error:
            self._failed(error)
            return []
        self._reach.answered()
        found = []
        for content in contents if isinstance(contents, list) else ():
            if content is None:
                break
            found.append(content)
        return found

    def flush(self) -> None:
        """Returns when all that was put is stored, or dropped."""
        self._outgoing.join()

    def _send(self) -> None:
        while True:
            key, content = self._outgoing.get()
            try:
                if time.monotonic() >= self._away_until_s:
                    self._redis.set(key, content, ex=EXPIRE_S, nx=True)
                    self._reach.answered()
            except self._errors as error:
                self._failed(error)
            finally:
                self._outgoing.task_done()

    def _failed(self, error: Exception) -> None:
        self._away_until_s = time.monotonic() + RETRY_S
        self._reach.failed(error)


def open_store(where: str) -> BlockStore:
    """The store that `--kv-spill` names: `redis://…`, or a number of bytes of this machine's memory."""
    return RedisStore(where) if "://" in where else MemoryStore(int(where))
