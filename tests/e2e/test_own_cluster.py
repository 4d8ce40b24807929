"""A cluster of the user's own, by `--kubeconfig`: it is used as it is, nothing is added to it, and `down` is not about it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from infra.apply import Cluster
from tests.e2e.conftest import ROOT, SLIPWAY

KINDS = (
    "/apis/apps/v1/namespaces/kube-system/deployments",
    "/apis/apps/v1/namespaces/kube-system/daemonsets",
    "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "/apis/storage.k8s.io/v1/storageclasses",
    "/api/v1/namespaces",
)


@pytest.fixture
def foreign(kubeconfig: Path, tmp_path: Path) -> Path:
    """The kubeconfig of the tests' cluster, for somebody who has made none."""
    path = tmp_path / "config"
    path.write_bytes(kubeconfig.read_bytes())
    return path


def as_stranger(tmp_path: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run the command where no cluster was ever made."""
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    return subprocess.run([SLIPWAY, *words], capture_output=True, text=True, cwd=ROOT, env=environment)


def specified(cluster: Cluster) -> set[tuple[str, str, int]]:
    """Every object of a cluster's own furniture, and which version of what it is to be."""
    items = [(path, item["metadata"]) for path in KINDS for item in cluster.get(path)["items"]]
    return {(path, metadata["uid"], metadata.get("generation", 0)) for path, metadata in items}


def test_it_is_used_as_it_is(foreign: Path, cluster: Cluster, tmp_path: Path) -> None:
    before = specified(cluster)
    done = as_stranger(tmp_path, "cluster", "up", "--kubeconfig", str(foreign), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["up"], found["how"], found["kubeconfig"]) == (True, "kubeconfig", str(foreign))
    assert found["nodes_ready"] >= 1
    assert specified(cluster) == before
    assert not (tmp_path / "state").exists()


def test_its_status_says_what_is_known_and_no_more(foreign: Path, tmp_path: Path) -> None:
    done = as_stranger(tmp_path, "cluster", "status", "--kubeconfig", str(foreign), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["how"] == "kubeconfig"
    assert found["network_policies"] == "unknown"


def test_down_leaves_a_cluster_that_somebody_else_made(foreign: Path, cluster: Cluster, tmp_path: Path) -> None:
    done = as_stranger(tmp_path, "cluster", "down", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"was_there": False}
    assert cluster.get("/version")["major"] == "1"
