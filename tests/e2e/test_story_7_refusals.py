"""Story 7: bad stacks are refused before anything is created, and leave the running one untouched."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.apply import Cluster
from tests.e2e.conftest import slipway, write_stack

Json = dict[str, Any]
# What is wrong → the change that makes it so, and words of the refusal.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"training.step": 5}, "did you mean"),
    "unknown pool": ({"training.pool": "gpu"}, "gpu"),
    "unknown instance": ({"node_pools.0.instance": "p9.huge"}, "p9.huge"),
    "no steps": ({"training.steps": 0}, "steps"),
    "batch not divisible": ({"training.global_batch": 15}, "15"),
    "heads not divisible": ({"training.model.heads": 5}, "heads"),
    "sequence above the context": ({"training.seq": 4096}, "4096"),
    "more nodes than the pool": ({"training.nodes": 9}, "9"),
    "negative rate": ({"training.optim.lr": -1}, "lr"),
    "memory too small for training": ({"training.resources": {"cpus": 0.25, "memory_gib": 0.01}}, "memory"),
    "memory too small for serving": ({"services.0.resources": {"cpus": 0.25, "memory_gib": 0.05}}, "memory"),
    "key-value cache above memory": ({"services.0.kv_gib": 8}, "kv"),
    "fewest above most replicas": ({"services.0.autoscaling": {"min_replicas": 5, "max_replicas": 2}}, "min_replicas"),
    "target of nothing": ({"services.0.autoscaling.target_in_flight": 0}, "target_in_flight"),
    "name that is no name": ({"services.0.name": "Chat_1"}, "Chat_1"),
    "unknown gate": ({"training.gate": {"must_beat": "luck"}}, "luck"),
    "port that is no port": ({"router.port": 700000}, "port"),
    "namespace that is no name": ({"platform.namespace": "My Team"}, "My Team"),
    "unknown source": ({"training.data.source": {"kind": "dreams"}}, "dreams"),
    "unknown cloud": ({"platform.cloud": "moon"}, "moon"),
}


@pytest.fixture(autouse=True)
def stack_as_it_was(project: Path) -> Iterator[None]:
    yield
    write_stack(project, {})


@pytest.mark.parametrize("what", BAD)
def test_refused_before_anything_is_created(
    what: str, settled: Json, cluster: Cluster, namespace: str, project: Path, kubeconfig: Path
) -> None:
    changes, words = BAD[what]
    before = versions(cluster, namespace)
    write_stack(project, changes)
    done = slipway("apply", "-s", "dev", cwd=project, kubeconfig=kubeconfig, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error:")
    assert "Traceback" not in done.stderr
    assert words.lower() in done.stderr.lower()
    assert versions(cluster, namespace) == before


def versions(cluster: Cluster, namespace: str) -> dict[str, str]:
    """What was declared of every object of the stack, by the generation that each change of it raises."""
    paths = (f"/apis/apps/v1/namespaces/{namespace}/deployments", f"/apis/batch/v1/namespaces/{namespace}/jobs")
    items = [item for path in paths for item in cluster.get(path)["items"]]
    return {item["metadata"]["uid"]: item["metadata"]["generation"] for item in items}
