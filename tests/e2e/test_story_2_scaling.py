"""Story 2: replicas follow the load, up and down, to none and back; whoever is let in is answered."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIConnectionError, InternalServerError, OpenAI

from infra.apply import Cluster
from tests.e2e.conftest import slipway, until, write_stack
from tests.e2e.load import under_load
from tests.e2e.watching import Prometheus

Json = dict[str, Any]
SCALING = {"by": "keda", "min_replicas": 1, "max_replicas": 2, "target_in_flight": 2, "scale_down_after_s": 20}
CLIENTS = 12
"""Four more than a replica decodes at once: these wait."""
SCALES_WITHIN_S = 600.0


def replicas(cluster: Cluster, namespace: str) -> tuple[int, int]:
    """(wanted, ready) of the service."""
    found = cluster.get(f"/apis/apps/v1/namespaces/{namespace}/deployments/chat")
    return found["spec"]["replicas"], found["status"].get("readyReplicas", 0)


def scaled_by_keda(project: Path, kubeconfig: Path, **changes: Any) -> None:
    write_stack(project, {"services.0.autoscaling": SCALING | changes})
    slipway("apply", "-s", "dev", "--wait", "300", cwd=project, kubeconfig=kubeconfig)


def test_replicas_follow_the_load_and_no_request_fails(
    settled: Json,
    endpoint: str,
    cluster: Cluster,
    prometheus: Prometheus,
    kubeconfig: Path,
    project: Path,
    namespace: str,
) -> None:
    scaled_by_keda(project, kubeconfig)
    until(lambda: replicas(cluster, namespace) == (1, 1), "more than one are kept", within_s=SCALES_WITHIN_S)
    with under_load(endpoint, model="pylib", clients=CLIENTS, max_tokens=64) as load:
        waiting = f'sum(slipway_serve_requests_waiting{{namespace="{namespace}"}}) > 0'
        until(lambda: bool(prometheus.query(waiting)), "no request waits", within_s=SCALES_WITHIN_S)
        until(lambda: replicas(cluster, namespace)[0] == 2, "it does not grow", within_s=SCALES_WITHIN_S)
        seen = slipway("status", "-s", "dev", "--no-drift", cwd=project, kubeconfig=kubeconfig, check=False)
        until(
            lambda: replicas(cluster, namespace) == (2, 2), "the new replica does not start", within_s=SCALES_WITHIN_S
        )
    with under_load(endpoint, model="pylib") as light:
        until(lambda: replicas(cluster, namespace) == (1, 1), "it does not shrink", within_s=SCALES_WITHIN_S)
    assert "slipway_serve_requests_in_flight by KEDA" in " ".join(seen.stderr.split())
    assert load.failures == []
    assert light.failures == []
    assert load.answered > CLIENTS
    assert light.answered > 0


@pytest.fixture
def none_at_least(settled: Json, kubeconfig: Path, project: Path) -> Iterator[None]:
    """The stack with no replica while nobody calls; afterwards it is as before."""
    assert settled
    try:
        scaled_by_keda(project, kubeconfig, min_replicas=0)
        yield
    finally:
        write_stack(project, {})
        slipway("apply", "-s", "dev", "--wait", "300", cwd=project, kubeconfig=kubeconfig)


@pytest.mark.usefixtures("none_at_least")
def test_none_is_kept_while_nobody_calls_and_a_call_brings_one_back(
    endpoint: str, cluster: Cluster, kubeconfig: Path, project: Path, namespace: str
) -> None:
    until(lambda: replicas(cluster, namespace) == (0, 0), "one is kept", within_s=SCALES_WITHIN_S)
    seen = slipway("status", "-s", "dev", "--no-drift", cwd=project, kubeconfig=kubeconfig, check=False)
    assert "KEDA keeps no replica" in " ".join(seen.stderr.split())
    client = OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0)
    refusals: list[InternalServerError] = []

    def answered() -> bool:
        try:
            client.completions.create(model="pylib", prompt="def ", max_tokens=4)
        except InternalServerError as refusal:
            refusals.append(refusal)
            return False
        except APIConnectionError:
            return False  # the router ends connections that are kept for long, and this client tries nothing twice
        return True

    # The last pod answers until it is gone, and the router knows it a moment longer.
    until(lambda: not answered() and "no healthy upstream" in str(refusals[-1:]), "nobody is refused")
    # Said at once, in OpenAI's shape, and with when to come back.
    assert refusals[-1].status_code == 503
    assert refusals[-1].response.headers["retry-after"]
    until(answered, "no replica comes back", within_s=SCALES_WITHIN_S)
    until(lambda: replicas(cluster, namespace)[1] >= 1, "the one that answers is not counted")
