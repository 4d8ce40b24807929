"""Story 3: what is served changes under load, and no request fails."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.apply import Cluster
from tests.e2e.conftest import SETTLED_S, forwarded, slipway, until, write_stack
from tests.e2e.load import under_load

Json = dict[str, Any]
NOWHERE = "localhost/nowhere:1"


def replica_sets(cluster: Cluster, namespace: str) -> dict[str, int]:
    """Pods that each generation of the service has."""
    path = f"/apis/apps/v1/namespaces/{namespace}/replicasets"
    items = cluster.get(path, labelSelector="app.kubernetes.io/instance=chat")["items"]
    return {item["metadata"]["name"]: item["status"].get("readyReplicas", 0) for item in items}


def served_digest(cluster: Cluster, namespace: str) -> str:
    """Of the model that answers, as the server's metrics say."""
    with forwarded(cluster, namespace, "chat", 8000) as url:
        text = httpx.get(f"{url}/metrics").text
    found = re.search(r'slipway_serve_model_info\{[^}]*digest="([0-9a-f]+)"[^}]*\} 1', text)
    assert found, text[-1000:]
    return found[1]


def test_new_pods_take_over_without_a_failed_request(
    settled: Json, endpoint: str, cluster: Cluster, kubeconfig: Path, project: Path, namespace: str
) -> None:
    before = replica_sets(cluster, namespace)
    write_stack(project, {"services.0.max_num_seqs": 4})
    with under_load(endpoint, model="pylib") as load:
        slipway("apply", "-s", "dev", "--wait", "600", cwd=project, kubeconfig=kubeconfig)
    after = {name: ready for name, ready in replica_sets(cluster, namespace).items() if ready}
    assert load.failures == []
    assert load.answered > 0
    assert not set(after) & {name for name, ready in before.items() if ready}


def test_pods_that_never_get_ready_take_nothing_over(
    settled: Json, endpoint: str, cluster: Cluster, kubeconfig: Path, project: Path, namespace: str
) -> None:
    before = {name: ready for name, ready in replica_sets(cluster, namespace).items() if ready}
    write_stack(project, {"services.0.max_num_seqs": 4, "images": {"serving": NOWHERE}})
    with under_load(endpoint, model="pylib") as load:
        done = slipway("apply", "-s", "dev", "--wait", "20", cwd=project, kubeconfig=kubeconfig, check=False)
    assert done.returncode == 1
    assert "deployment/chat" in done.stderr
    assert load.failures == []
    assert {name: ready for name, ready in replica_sets(cluster, namespace).items() if ready} == before
    write_stack(project, {"services.0.max_num_seqs": 4})
    slipway("apply", "-s", "dev", "--wait", "300", cwd=project, kubeconfig=kubeconfig)


@pytest.mark.usefixtures("settled")
def test_a_new_model_is_swapped_in(
    endpoint: str, cluster: Cluster, kubeconfig: Path, project: Path, namespace: str
) -> None:
    """Another number of steps: trained again on the same data, judged, published, served; the old one answers until then."""
    before = served_digest(cluster, namespace)
    write_stack(project, {"services.0.max_num_seqs": 4, "training.steps": 40})
    with under_load(endpoint, model="pylib") as load:
        done = slipway("apply", "-s", "dev", "--wait", str(SETTLED_S), cwd=project, kubeconfig=kubeconfig)
        # The channel has moved, and the server looks at it every few seconds.
        until(lambda: served_digest(cluster, namespace) != before, "the old model is served", within_s=SETTLED_S)
    assert "job/data" not in done.stderr, "the data was prepared again"
    assert load.failures == []
