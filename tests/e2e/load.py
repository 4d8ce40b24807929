"""Requests, one after another, for as long as something else happens; and what came of them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from openai import OpenAI, OpenAIError

MOST = 20_000
"""Requests of a client, so that a test that hangs ends."""
ANSWER_S = 180.0


@dataclass
class Load:
    answered: int = 0
    failures: list[str] = field(default_factory=list[str])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, failure: str | None) -> None:
        with self._lock:
            if failure is None:
                self.answered += 1
            else:
                self.failures.append(failure)


@contextmanager
def under_load(url: str, *, model: str, clients: int = 1, max_tokens: int = 4) -> Iterator[Load]:
    """Ask without a pause and without a retry: every failure counts."""
    load, over = Load(), threading.Event()
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S)

    def ask() -> None:
        for _ in range(MOST):
            if over.is_set():
                return
            try:
                client.completions.create(model=model, prompt="def ", max_tokens=max_tokens, temperature=0)
                load.count(None)
            except OpenAIError as error:
                load.count(repr(error))

    asking = [threading.Thread(target=ask, daemon=True) for _ in range(clients)]
    for thread in asking:
        thread.start()
    try:
        yield load
    finally:
        over.set()
        for thread in asking:
            thread.join(timeout=ANSWER_S)
