"""Story 4: what a stack trains and serves through: a full disk, a dead kubelet and API server, pods deleted, evicted and killed for
memory, a drained node. The training is the one that `settled` made undisturbed, once more."""

import hashlib
import json
from collections.abc import Callable
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
GANG = "app.kubernetes.io/component in (train,promote)"
MOVES_WITHIN_S = 900.0
FULL, KILLED = "Free some space", "exitcode: -9"
"""What the trainer and its launcher say."""
# Takes memory until the kernel ends another process of the container: they are made to go first, the largest of them before the others.
HUNGRY = """
import os
others = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()]
for pid in others:
    with open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write("1000")
held = []
while all(os.path.exists(f"/proc/{pid}") for pid in others):
    held.append(b"x" * (1 << 24))
"""


@dataclass(frozen=True)
class Ordeal:
    """What a run looks like that went through all of it, beside the one that did not."""

    undisturbed: Json
    disturbed: Json
    load: Load
    status: Json
    """What `slipway status` said of the training meanwhile."""


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

    def say(self, component: str, words: str) -> bool:
        """Whether a pod that runs has said so."""
        names = [pod["metadata"]["name"] for pod in self.pods(component)]
        logs = (self.kubectl("-n", self.namespace, "logs", name, "--tail=-1", check=False).stdout for name in names)
        return any(words in log for log in logs)

    def goes_on(self) -> None:
        """Return when the whole gang has come further than the training is now."""
        until(lambda: len(self.pods("train")) == 2, "no whole gang runs", within_s=MOVES_WITHIN_S)
        now = self.checkpoint()
        until(
            lambda: self.checkpoint() > now and len(self.pods("train")) == 2,
            f"no checkpoint after step {now}",
            within_s=MOVES_WITHIN_S,
        )

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
) -> Ordeal:
    needed()
    write_stack(project, TWO_SERVERS)
    slipway("apply", "-s", "dev", "--wait", str(SETTLED_S), cwd=project, kubeconfig=kubeconfig)
    until(lambda: _servers(cluster, namespace) == 2, "there are no two servers", within_s=SETTLED_S)
    kubectl("-n", namespace, "delete", "job", "-l", GANG)
    try:
        with small_disk(cluster, namespace=namespace, claim="runs", size_mib=DISK_MIB) as disk:
            slipway("apply", "-s", "dev", cwd=project, kubeconfig=kubeconfig)
            stack = _Stack(cluster, kubectl, namespace, disk, _run_of(cluster, namespace))
            with load_from_inside(cluster, kubectl, namespace=namespace, model="pylib") as load:
                for fault in (a_full_disk_and_no_control_plane, a_deleted_pod, a_drain_and_a_rank_out_of_memory):
                    stack.goes_on()
                    status = slipway(
                        "status", "-s", "dev", "--no-drift", "--json", cwd=project, kubeconfig=kubeconfig, check=False
                    )
                    fault(stack)
                slipway("apply", "-s", "dev", "--wait", str(SETTLED_S), cwd=project, kubeconfig=kubeconfig)
                result = load()
            undisturbed, disturbed = (_outcome(folder / stack.run) for folder in (disk.under, disk.over))
    finally:
        # Whose disk has gone would wait on it for ever.
        kubectl("-n", namespace, "delete", "job", "-l", GANG)
        write_stack(project, {})
        slipway("apply", "-s", "dev", cwd=project, kubeconfig=kubeconfig)
    return Ordeal(undisturbed, disturbed, result, json.loads(status.stdout)["training"])


def _servers(cluster: Cluster, namespace: str) -> int:
    """Those that have been ready for as long as it takes to find them."""
    return cluster.get(f"/apis/apps/v1/namespaces/{namespace}/deployments/chat")["status"].get("availableReplicas", 0)


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


def a_full_disk_and_no_control_plane(stack: _Stack) -> None:
    """No room for a checkpoint, until a rank has ended of it; kill -9 of kubelet and API server, while pods run on."""
    stack.disk.fill()
    kill_process("kubelet")
    kill_process("kube-apiserver")
    until(lambda: bool(stack.cluster.get("/readyz/ping")), "the API server does not come back")
    until(lambda: stack.say("train", FULL), "no rank ends of a full disk", within_s=MOVES_WITHIN_S)
    stack.disk.free()


def a_deleted_pod(stack: _Stack) -> None:
    stack.kubectl("-n", stack.namespace, "delete", "pod", stack.pods("train")[1]["metadata"]["name"], "--wait=false")


def a_drain_and_a_rank_out_of_memory(stack: _Stack) -> None:
    """A rank dies, then all that goes, goes while the node takes nothing; it is opened again, and takes everything back."""
    node = stack.kubectl("get", "nodes", "-o", "name").stdout.split()[0]
    gang = stack.pods("train")
    hungry = gang[1]["metadata"]["name"]
    stack.kubectl("-n", stack.namespace, "exec", hungry, "--", "python", "-c", HUNGRY, check=False)
    # The launcher says so and begins the rank again, unless the kernel ends the whole pod at once.
    until(
        lambda: stack.say("train", KILLED) or _uids(stack.pods("train")) != _uids(gang),
        "nobody dies for memory",
    )
    stack.kubectl("cordon", node)
    try:
        first, second = stack.pods("serve")
        assert stack.evict(first) == 201
        assert stack.evict(second) == 429, "the disruption budget lets the last server go"
        assert {stack.evict(pod) for pod in stack.pods("train")} <= {201}
    finally:
        stack.kubectl("uncordon", node)
    # The rest of the drain, once the router can have found what took the first one's place: a budget counts those that are ready.
    until(
        lambda: _servers(stack.cluster, stack.namespace) == 2 and stack.evict(second) == 201,
        "the second server is not let go",
        within_s=MOVES_WITHIN_S,
    )


def _uids(pods: list[Json]) -> list[str]:
    return [pod["metadata"]["uid"] for pod in pods]


def test_training_ends_with_the_losses_of_an_undisturbed_run(ordeal: Ordeal) -> None:
    assert len(ordeal.undisturbed["losses"]) > 1
    assert ordeal.disturbed == ordeal.undisturbed


def test_no_request_fails(ordeal: Ordeal) -> None:
    assert ordeal.load.failures == []
    assert ordeal.load.answered > 0


def test_a_person_is_told_how_far_it_is(ordeal: Ordeal) -> None:
    assert 0 < ordeal.status["last_checkpoint_step"] <= ordeal.status["step"] <= ordeal.status["steps"]
    assert 0 < ordeal.status["goodput_ratio"] < 1
