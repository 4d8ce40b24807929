"""Quotas of one caller: a bucket of requests and a bucket of tokens, each filled steadily and holding a minute's worth.

Tokens of a prompt are taken before the answer; tokens of an answer are not known before, so they are taken as they
are made and the bucket may go below empty: the caller then waits until it is full enough again.
"""

import math
import time
from collections.abc import Callable

from serving.auth import Key

MINUTE_S = 60.0
ROUNDING = 1e-6  # so that who waits as long as told is not told to wait again for the last bit of a float


class Bucket:
    """`take` says how long to wait, in seconds; 0.0 means that it was taken."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float]) -> None:
        self.capacity, self._clock = per_minute, clock
        self._level, self._at_s = float(per_minute), clock()

    @property
    def level(self) -> float:
        now_s = self._clock()
        self._level = min(self.capacity, self._level + (now_s - self._at_s) * self.capacity / MINUTE_S)
        self._at_s = now_s
        return self._level

    def wait_s(self, amount: int) -> float:
        """How long until `amount` could be taken; of more than the bucket ever holds, until it is full."""
        missing = min(amount, self.capacity) - self.level
        return missing * MINUTE_S / self.capacity if missing > ROUNDING else 0.0

    def take(self, amount: int) -> None:
        self._level = self.level - amount


class Quota:
    """One key's buckets."""

    def __init__(self, key: Key, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests = Bucket(key.requests_per_minute, clock=clock) if key.requests_per_minute else None
        self.tokens = Bucket(key.tokens_per_minute, clock=clock) if key.tokens_per_minute else None

    def admit(self, prompt_tokens: int) -> tuple[str, int] | None:
        """Takes a request of so many prompt tokens; or takes nothing and returns (what is short, whole seconds to wait)."""
        asked = [("requests", self.requests, 1), ("tokens", self.tokens, prompt_tokens)]
        short = [(b.wait_s(amount), name) for name, b, amount in asked if b is not None and b.wait_s(amount) > 0]
        if short:
            wait_s, name = max(short)
            return name, math.ceil(wait_s)
        for _, bucket, amount in asked:
            if bucket is not None:
                bucket.take(amount)
        return None

    def charge(self, output_tokens: int) -> None:
        if self.tokens is not None:
            self.tokens.take(output_tokens)

    def headers(self) -> dict[str, str]:
        """What is left, in the names that OpenAI's clients know."""
        found = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level)))
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.wait_s(bucket.capacity):.3f}s"
        return found


class Quotas:
    """The quota of every key that has been used; one whose limits were changed begins with full buckets."""

    def __init__(self) -> None:
        self._of: dict[Key, Quota] = {}

    def of(self, key: Key) -> Quota:
        quota = self._of.get(key)
        if quota is None:
            for old in [other for other in self._of if other.name == key.name]:
                del self._of[old]
            quota = self._of[key] = Quota(key)
        return quota
