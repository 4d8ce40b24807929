"""Story 4: pods, kubelet and API server die while the stack trains and serves."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.apply import Cluster
from infra.clouds.local import Places
from tests.e2e.conftest import SETTLED_S, slipway, until, write_stack
from tests.e2e.load import under_load

Json = dict[str, Any]


def kill_process(program: str) -> None:
    """kill -9 of a process of the node, and of no other that is called so."""
    node = str(Places.of_user().cache).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            first = (folder / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        if first.startswith(node) and first.endswith(f"/{program}".encode()):
            os.kill(int(folder.name), signal.SIGKILL)
            return
    raise AssertionError(f"no {program} of the node runs")


def test_training_ends_and_no_request_fails_whatever_dies(
    settled: Json,
    endpoint: str,
    cluster: Cluster,
    kubectl: Callable[..., Any],
    kubeconfig: Path,
    project: Path,
    namespace: str,
) -> None:
    write_stack(
        project,
        {"services.0.max_num_seqs": 4, "training.steps": 120, "training.checkpoint": {"every_steps": 20, "keep": 2}},
    )
    path = f"/api/v1/namespaces/{namespace}/pods"

    def running() -> list[str]:
        pods = cluster.get(path, labelSelector="app.kubernetes.io/component=train")["items"]
        return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] == "Running"]

    with under_load(endpoint, model="pylib") as load:
        slipway("apply", "-s", "dev", cwd=project, kubeconfig=kubeconfig)
        until(lambda: len(running()) == 2, "the ranks do not start")
        kubectl("-n", namespace, "delete", "pod", sorted(running())[1], "--wait=false")
        kill_process("kubelet")
        kill_process("kube-apiserver")
        until(lambda: bool(cluster.get("/readyz/ping")), "the API server does not come back")
        slipway("apply", "-s", "dev", "--wait", str(SETTLED_S), cwd=project, kubeconfig=kubeconfig)
    jobs = cluster.get(f"/apis/batch/v1/namespaces/{namespace}/jobs", labelSelector="app.kubernetes.io/component=train")
    assert [job["status"]["succeeded"] for job in jobs["items"]] == [2]
    assert load.answered > 0
    # kubectl's own tunnel to the router ends with the API server: nothing but that may fail.
    assert [failure for failure in load.failures if "Connection" not in failure] == []
