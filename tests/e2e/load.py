"""Requests, one after another, for as long as something else happens; and what came of them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from openai import OpenAI, OpenAIError

MOST = 20_000
"""Requests, so that a test that hangs ends."""


@dataclass
class Load:
    answered: int = 0
    failures: list[str] = field(default_factory=list[str])


@contextmanager
def under_load(url: str, *, model: str) -> Iterator[Load]:
    """Ask without a pause and without a retry: every failure counts."""
    load, over = Load(), threading.Event()
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask() -> None:
        for _ in range(MOST):
            if over.is_set():
                return
            try:
                client.completions.create(model=model, prompt="def ", max_tokens=4, temperature=0)
                load.answered += 1
            except OpenAIError as error:
                load.failures.append(repr(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        yield load
    finally:
        over.set()
        asking.join(timeout=90)
