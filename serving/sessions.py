"""Sessions of the chat page: who is logged in, and the conversations that they keep. In Redis or Valkey, or in memory.

With a store of its own beside the replicas any of them answers any session; in memory a session lives as long as the
process. The cookie's value is random, and the store knows only its hash: who reads the store can't log in with it.
"""

import hashlib
import json
import secrets
import time
from typing import Any, Protocol

from serving.errors import Refused
from serving.reach import Reach

SESSION_TTL_S = 14 * 24 * 3600
MAX_CONVERSATIONS = 100
MEMORY_MAX_KEYS = 10_000


class StoreError(RuntimeError):
    """The store cannot be reached."""


class Store(Protocol):
    """Hashes by key, each forgotten when it was not written for so long."""

    @property
    def failures(self) -> int:
        """How often it did not answer."""
        ...

    async def all(self, key: str) -> dict[str, str]: ...
    async def put(self, key: str, name: str, value: str) -> None: ...
    async def drop(self, key: str, name: str | None = None) -> None: ...
    async def close(self) -> None: ...


class MemoryStore:
    failures = 0

    def __init__(self) -> None:
        self._hashes: dict[str, tuple[float, dict[str, str]]] = {}  # key → (when it ends, fields); last written last

    async def all(self, key: str) -> dict[str, str]:
        ends_s, fields = self._hashes.get(key, (0.0, {}))
        return dict(fields) if time.monotonic() < ends_s else {}

    async def put(self, key: str, name: str, value: str) -> None:
        fields = await self.all(key)
        self._hashes.pop(key, None)
        self._hashes[key] = (time.monotonic() + SESSION_TTL_S, {**fields, name: value})
        while len(self._hashes) > MEMORY_MAX_KEYS:
            del self._hashes[next(iter(self._hashes))]

    async def drop(self, key: str, name: str | None = None) -> None:
        if name is None:
            self._hashes.pop(key, None)
        elif key in self._hashes:
            self._hashes[key][1].pop(name, None)

    async def close(self) -> None:
        self._hashes.clear()


class RedisStore:
    def __init__(self, url: str) -> None:
        """Raises `Refused` when the client library is missing or the URL is none of its own."""
        try:
            from redis import asyncio as redis
        except ImportError:
            fix = "Install redis, or leave the store out to keep sessions in memory"
            raise Refused("the client of Redis is not installed", where="--session-store", fix=fix) from None
        try:
            self._redis = redis.from_url(
                url, decode_responses=True, socket_timeout=2, socket_connect_timeout=2, health_check_interval=30
            )
        except ValueError as error:
            fix = "Give redis://HOST:PORT/DB, rediss:// for TLS"
            raise Refused(f"the address is malformed: {error}", where="--session-store", fix=fix) from None
        self._errors = (redis.RedisError, OSError)
        self._reach = Reach("sessions")

    @property
    def failures(self) -> int:
        return self._reach.failures

    async def all(self, key: str) -> dict[str, str]:
        return await self._try(self._redis.hgetall(key))

    async def put(self, key: str, name: str, value: str) -> None:
        async with self._redis.pipeline(transaction=True) as both:
            both.hset(key, name, value)
            both.expire(key, SESSION_TTL_S)
            await self._try(both.execute())

    async def drop(self, key: str, name: str | None = None) -> None:
        await self._try(self._redis.delete(key) if name is None else self._redis.hdel(key, name))

    async def close(self) -> None:
        await self._redis.aclose()

    async def _try(self, work: Any) -> Any:
        try:
            found = await work
        except self._errors as error:
            self._reach.failed(error)
            raise StoreError(f"the session store cannot be reached: {error}") from None
        self._reach.answered()
        return found


class Sessions:
    """A session is a cookie's value; its user is "" when the server asks for no key."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def at(cls, url: str | None) -> "Sessions":
        return cls(RedisStore(url) if url else MemoryStore())

    @property
    def failures(self) -> int:
        return self._store.failures

    async def open(self, user: str) -> str:
        """A new session, and its cookie's value."""
        token = secrets.token_urlsafe(32)
        await self._store.put(_session(token), "user", user)
        return token

    async def user(self, token: str) -> str | None:
        """Whose session it is; None when it has ended, or never was."""
        return (await self._store.all(_session(token))).get("user") if token else None

    async def end(self, token: str) -> None:
        await self._store.drop(_session(token))

    async def conversations(self, owner: str) -> list[dict[str, Any]]:
        """An owner's conversations, the last changed first."""
        found = [json.loads(value) for value in (await self._store.all(_history(owner))).values()]
        return sorted(found, key=lambda conversation: -conversation["changed_s"])

    async def keep(self, owner: str, conversation: dict[str, Any]) -> None:
        """Stores a conversation under its id. The oldest makes room when there are too many."""
        key = _history(owner)
        await self._store.put(key, conversation["id"], json.dumps({**conversation, "changed_s": time.time()}))
        for old in (await self.conversations(owner))[MAX_CONVERSATIONS:]:
            await self._store.drop(key, old["id"])

    async def forget(self, owner: str, conversation_id: str) -> None:
        await self._store.drop(_history(owner), conversation_id)

    async def close(self) -> None:
        await self._store.close()


def owner_of(user: str, token: str) -> str:
    """Who keeps a history: the user, on every device; without users, the browser's session alone."""
    return f"user:{user}" if user else f"session:{_hash(token)}"


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _session(token: str) -> str:
    return f"slipway:session:{_hash(token)}"


def _history(owner: str) -> str:
    return f"slipway:history:{owner}"
