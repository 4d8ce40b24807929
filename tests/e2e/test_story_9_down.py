"""At the end: the stack goes without its volumes, then with them; the cluster leaves the machine as it was."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from infra.apply import Cluster
from infra.clouds.local import Places
from tests.e2e.conftest import slipway

Json = dict[str, Any]


def test_destroy_keeps_what_was_made(
    settled: Json, kubeconfig: Path, project: Path, cluster: Cluster, namespace: str
) -> None:
    slipway("destroy", "-s", "dev", cwd=project, kubeconfig=kubeconfig)
    assert cluster.get(f"/apis/apps/v1/namespaces/{namespace}/deployments")["items"] == []
    claims = cluster.get(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims")["items"]
    assert {claim["metadata"]["name"] for claim in claims} == {"data", "runs", "registry"}


def test_destroy_with_volumes_removes_all(
    settled: Json, kubeconfig: Path, project: Path, cluster: Cluster, namespace: str
) -> None:
    slipway("destroy", "-s", "dev", "--volumes", cwd=project, kubeconfig=kubeconfig)
    spaces = {space["metadata"]["name"] for space in cluster.get("/api/v1/namespaces")["items"]}
    assert namespace not in spaces


@pytest.mark.skipif(os.environ.get("SLIPWAY_E2E_KEEP") == "1", reason="SLIPWAY_E2E_KEEP=1: the cluster is kept")
def test_down_leaves_no_trace(kubeconfig: Path) -> None:
    assert json.loads(slipway("cluster", "down", "--json").stdout) == {"was_there": True}
    places = Places.of_user()
    assert not places.state.exists()
    assert "slipway" not in Path("/proc/self/mountinfo").read_text()
    assert not list(Path("/sys/class/net").glob("slipway*"))
    assert not list(Path("/sys/fs/cgroup").glob("**/slipway"))
    commands = b"".join(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    for program in (b"kube-apiserver", b"kubelet", b"containerd-shim", b"etcd\0"):
        assert program not in commands
    assert json.loads(slipway("cluster", "down", "--json").stdout) == {"was_there": False}
