"""Requests, one after another, for as long as something else happens; and what came of them."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI, OpenAIError

from infra.apply import Cluster
from tests.e2e.pods import CALLER, image_of, may_call, pod

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


# Says after each answer how many there were, and every failure so far.
ASKS = """
import http.client, json, sys, time
host, model = sys.argv[1:]
body = json.dumps({"model": model, "prompt": "def ", "max_tokens": 4, "temperature": 0})
answered, failures = 0, []
while True:
    try:
        connection = http.client.HTTPConnection(host, timeout=180)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.status == 200:
            answered += 1
        else:
            failures.append(f"{time.strftime('%H:%M:%S')} {answer.status} {text[:200]!r}")
    except (OSError, http.client.HTTPException) as error:
        failures.append(f"{time.strftime('%H:%M:%S')} {error!r}")
    print(json.dumps({"answered": answered, "failures": failures}), flush=True)
    time.sleep(0.2)
"""


@contextmanager
def load_from_inside(
    cluster: Cluster, kubectl: Callable[..., Any], *, namespace: str, model: str
) -> Iterator[Callable[[], Load]]:
    """A pod beside the stack's asks the router, on a connection for each request: no tunnel through the API server, which may
    die meanwhile. What came of it so far is what the yielded function returns."""
    caller = pod(
        "load", namespace, image_of(cluster, namespace), ["python", "-c", ASKS, "router:8080", model], labels=CALLER
    )
    cluster.apply(may_call(namespace))
    cluster.apply(caller)

    def so_far() -> Load:
        lines = kubectl("-n", namespace, "logs", "load", "--tail=1").stdout.splitlines()
        return Load(**json.loads(lines[-1])) if lines else Load()

    try:
        kubectl("-n", namespace, "wait", "pod/load", "--for=condition=Ready", "--timeout=180s")
        yield so_far
    finally:
        kubectl("-n", namespace, "delete", "pod/load", "networkpolicy/test-caller", "--grace-period=0", "--force")
