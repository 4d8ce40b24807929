"""Story 4: what a stack trains and serves through: a full disk, a dead kubelet and API server, pods deleted, evicted and killed for
memory, a drained node. The training is the one that `settled` made undisturbed, once more."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.apply import ApiError, Cluster
from tests.e2e.conftest import SETTLED_S, slipway, until, write_stack
from tests.e2e.load import Load, load_from_inside
from tests.e2e.own_node import Disk, kill_process, needed, small_disk

Json = dict[str, Any]
TWO_SERVERS = {"services.0.autoscaling": {"min_replicas": 2, "max_replicas": 2, "target_in_flight": 4}}
DISK_MIB = 64
"""Room for the few checkpoints that are there at once, and the model."""
FAR = 5
"""Steps from one checkpoint to the next."""
MOVES_WITHIN_S = 600.0
# Takes memory until the kernel ends the largest other process of the container, which is made to go first.
HUNGRY = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) != os.getpid():
        with open(f"/proc/{pid}/oom_score_adj", "w") as file:
            file.write("1000")
held = []
while True:
    held.append(b"x" * (1 << 24))
"""


@dataclass(frozen=True)
class Ordeal:
    """What a run looks like that went through all of it, beside the one that did not."""

    undisturbed: Json
    disturbed: Json
    load: Load
    said: list[str]
    """Lines of the training pods that are still there."""


@dataclass(frozen=True)
class _Stack:
    cluster: Cluster
    kubectl: Callable[..., Any]
    namespace: str
    disk: Disk
    run: str

    def pods(self, component: str) -> list[Json]:
        """Those that run, by name."""
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        items = self.cluster.get(path, labelSelector=f"app.kubernetes.io/component={component}")["items"]
        alive = [
            pod for pod in items if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]
        return sorted(alive, key=lambda pod: pod["metadata"]["name"])

    def checkpoint(self) -> int:
        """Step of the newest; 0 where there is none."""
        found = (self.disk.over / self.run / "checkpoints").glob("step-*/manifest.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    def goes_on(self) -> None:
        """Return when the training has come further than it is now."""
        now = self.checkpoint()
        until(lambda: self.checkpoint() > now, f"no checkpoint after step {now}", within_s=MOVES_WITHIN_S)

    def evict(self, pod: Json) -> int:
        """The status that the eviction API answers."""
        metadata = {"name": pod["metadata"]["name"], "namespace": self.namespace}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{metadata['name']}/eviction"
        try:
            self.cluster.request("POST", path, body=body)
        except ApiError as error:
            return error.status
        return 201


@pytest.fixture(scope="module")
def ordeal(
    settled: Json, cluster: Cluster, kubectl: Callable[..., Any], kubeconfig: Path, project: Path, namespace: str
) -> Iterator[Ordeal]:
    needed()
    kubectl("-n", namespace, "delete", "job", "-l", "app.kubernetes.io/component in (train,promote)")
    with small_disk(cluster, namespace=namespace, claim="runs", size_mib=DISK_MIB) as disk:
        write_stack(project, TWO_SERVERS)
        slipway("apply", "-s", "dev", cwd=project, kubeconfig=kubeconfig)
        stack = _Stack(cluster, kubectl, namespace, disk, _run_of(cluster, namespace))
        kubectl("-n", namespace, "rollout", "status", "deployment/chat", "--timeout=300s")
        with load_from_inside(cluster, kubectl, namespace=namespace, model="pylib") as load:
            for fault in (a_dead_control_plane, a_full_disk, a_deleted_pod, a_drain_and_a_pod_out_of_memory):
                stack.goes_on()
                fault(stack)
            slipway("apply", "-s", "dev", "--wait", str(SETTLED_S), cwd=project, kubeconfig=kubeconfig)
            result = load()
        said = kubectl("-n", namespace, "logs", "-l", "app.kubernetes.io/component=train", "--tail=-1").stdout
        undisturbed, disturbed = (_outcome(folder / stack.run) for folder in (disk.under, disk.over))
        yield Ordeal(undisturbed, disturbed, result, said.splitlines())
    write_stack(project, {})
    slipway("apply", "-s", "dev", cwd=project, kubeconfig=kubeconfig)


def _run_of(cluster: Cluster, namespace: str) -> str:
    """Name of the folder that the training writes, in the claim `runs`."""
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    (job,) = cluster.get(path, labelSelector="app.kubernetes.io/component=train")["items"]
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    return next(word for word in command if word.startswith("run=")).removeprefix("run=/runs/")


def _outcome(run: Path) -> Json:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (evaluation,) = run.glob("evaluation-*/evaluation.json")
    return {
        "losses": {row["step"]: row["loss"] for row in rows},
        "weights": hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "evaluation": json.loads(evaluation.read_text()),
    }


def a_dead_control_plane(stack: _Stack) -> None:
    """kill -9 of kubelet and API server; pods run on meanwhile."""
    kill_process("kubelet")
    kill_process("kube-apiserver")
    until(lambda: bool(stack.cluster.get("/readyz/ping")), "the API server does not come back")


def a_full_disk(stack: _Stack) -> None:
    """No room for a checkpoint, until a rank has ended of it."""
    uids = {pod["metadata"]["uid"] for pod in stack.pods("train")}
    stack.disk.fill()
    until(lambda: not uids <= {pod["metadata"]["uid"] for pod in stack.pods("train")}, "no rank ends of a full disk")
    stack.disk.free()


def a_deleted_pod(stack: _Stack) -> None:
    stack.kubectl("-n", stack.namespace, "delete", "pod", stack.pods("train")[1]["metadata"]["name"], "--wait=false")


def a_drain_and_a_pod_out_of_memory(stack: _Stack) -> None:
    """All that goes, goes while the node takes nothing; then it is opened again, and takes everything back."""
    node = stack.kubectl("get", "nodes", "-o", "name").stdout.split()[0]
    stack.kubectl("cordon", node)
    try:
        first, second = stack.pods("serve")
        assert stack.evict(first) == 201
        assert stack.evict(second) == 429, "the disruption budget lets the last server go"
        evicted, hungry = stack.pods("train")
        name = hungry["metadata"]["name"]
        stack.kubectl("-n", stack.namespace, "exec", name, "--", "python", "-c", HUNGRY, check=False)
        until(lambda: hungry["metadata"]["uid"] not in {p["metadata"]["uid"] for p in stack.pods("train")}, "no death")
        stack.evict(evicted)
    finally:
        stack.kubectl("uncordon", node)
    # The rest of the drain, as soon as the budget has room for it.
    until(lambda: stack.evict(second) == 201, "the second server is not let go", within_s=MOVES_WITHIN_S)


def test_training_ends_with_the_losses_of_an_undisturbed_run(ordeal: Ordeal) -> None:
    assert len(ordeal.undisturbed["losses"]) > 1
    assert ordeal.disturbed == ordeal.undisturbed


def test_no_request_fails(ordeal: Ordeal) -> None:
    assert ordeal.load.failures == []
    assert ordeal.load.answered > 0
