"""What is Pending and why, where a roll-out stands, what an autoscaler sees: recorded objects in, sentences out."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.live import Line, Snapshot, explain
from infra.live.explain import why_forbidden
from infra.live.pods import state_of, why
from infra.live.scrape import Training, from_log, from_metrics, rank_0

from . import live_objects as k8s

PREEMPTION = " preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling."


def only(snapshot: Snapshot) -> Line:
    (line,) = explain(snapshot)
    return line


@pytest.mark.parametrize(
    ("message", "says", "mends"),
    [
        ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "asks for 8 of nvidia.com/gpu", "max_nodes"),
        (
            "0/3 nodes are available: 1 Insufficient memory, 2 Insufficient cpu.",
            "asks for 8Gi of memory",
            "ask for less",
        ),
        (
            "0/3 nodes are available: 3 node(s) had untolerated taint {slipway.dev/pool: train}.",
            "taint slipway.dev/pool: train keeps it out (3 nodes)",
            "another pool",
        ),
        (
            "0/1 nodes are available: 1 node(s) had untolerated taint(s) {node.kubernetes.io/disk-pressure: }.",
            "disk-pressure",
            "the node's disk is full",
        ),
        (
            "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.",
            "slipway.dev/pool=serve",
            "label the nodes",
        ),
        ("0/3 nodes are available: 3 node(s) had volume node affinity conflict.", "another zone", "storage.shared"),
        ("0/2 nodes are available: 2 node(s) were unschedulable.", "cordoned (2 nodes)", "uncordon"),
        ("0/2 nodes are available: 2 Too many pods.", "at their most", "add a node"),
        ("0/0 nodes available: no nodes are available to schedule pods", "has no node yet", "autoscaler is making one"),
        ('persistentvolumeclaim "corpora" not found', "there is no volume 'corpora'", "volume_claim"),
        (
            '0/1 nodes are available: persistentvolumeclaim "corpora" not found. not found',
            "there is no volume 'corpora'",
            "volume_claim",
        ),
        (
            "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate,",
            "asks for 2 of cpu, and no node has as much free",
            "ask for less",
        ),
    ],
)
def test_a_pod_without_a_node_says_why_and_what_mends_it(message: str, says: str, mends: str) -> None:
    for text in (message, message + PREEMPTION):
        pod = k8s.unscheduled(text)
        assert state_of(pod) == "pending"
        told = " ".join(why(pod, k8s.seen(pod)))
        assert says in told
        assert mends in told
        assert "Preemption" not in told


@pytest.mark.parametrize(
    ("tolerations", "named"),
    [
        ([], "taint team: other, slow keeps it out (1 node)"),
        ([{"key": "team", "operator": "Equal", "value": "other"}], "taint slow keeps it out (1 node)"),
        ([{"key": "team", "value": "mine"}, {"key": "slow", "operator": "Exists"}], "taint team: other keeps it out"),
        ([{"operator": "Exists", "effect": "NoExecute"}], "taint team: other, slow keeps it out (1 node)"),
    ],
)
def test_a_taint_that_the_scheduler_does_not_name_is_found_on_the_nodes(
    tolerations: list[k8s.Json], named: str
) -> None:
    pod = k8s.unscheduled("0/1 nodes are available: 1 node(s) had untolerated taint(s).")
    pod["spec"]["tolerations"] = tolerations
    told = why(pod, k8s.seen(pod))
    assert "a taint keeps it out (1 node)" in told[0]  # who may not list nodes
    taints = [
        {"key": "team", "value": "other", "effect": "NoSchedule"},
        {"key": "slow", "effect": "NoSchedule"},
        {"key": "rather-not", "effect": "PreferNoSchedule"},
    ]
    node = {"metadata": {"name": "node-a"}, "spec": {"taints": taints}}
    assert named in why(pod, k8s.seen(pod, nodes=[node]))[0]


def test_every_clause_of_the_scheduler_is_told_once() -> None:
    pod = k8s.unscheduled("0/4 nodes are available: 1 Insufficient cpu, 1 Insufficient memory, 2 node(s) had foo.")
    assert len(why(pod, k8s.seen(pod))) == 3


@given(st.text(max_size=80))
def test_any_message_of_a_scheduler_is_said_somehow(message: str) -> None:
    pod = k8s.unscheduled(message)
    assert all(why(pod, k8s.seen(pod)))


@pytest.mark.parametrize(
    ("reason", "message", "says"),
    [
        ("ImagePullBackOff", "Back-off pulling image: not found", "there is no such image"),
        ("ErrImagePull", "failed to authorize: 401 Unauthorized", "images.pull_secret"),
        ("ErrImagePull", "dial tcp: lookup registry.example: no such host", "does not answer from the node"),
        ("CreateContainerConfigError", 'secret "keys" not found', "a Secret or a ConfigMap that it names is not there"),
        ("ErrImageNeverPull", "", "load it"),
    ],
)
def test_a_container_that_cannot_start_says_why(reason: str, message: str, says: str) -> None:
    pod = k8s.waiting(reason, message)
    assert state_of(pod) == "failing"
    assert says in " ".join(why(pod, k8s.seen(pod)))


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        ({"exitCode": 137, "reason": "OOMKilled"}, "raise its memory_gib"),
        ({"exitCode": 2, "reason": "Error"}, "refused its input"),
        ({"exitCode": 75, "reason": "Error"}, "interrupted after a checkpoint"),
        ({"exitCode": 9, "reason": "Error"}, "exit code 9"),
    ],
)
def test_a_crash_is_told_by_how_it_ended(ended: dict[str, Any], says: str) -> None:
    pod = k8s.waiting("CrashLoopBackOff", restarts=4, last=ended)
    assert "(4 times)" in why(pod, k8s.seen(pod))[0]
    assert says in why(pod, k8s.seen(pod))[0]


def test_a_volume_that_is_not_bound_is_the_reason_of_its_pod() -> None:
    pod = k8s.unscheduled("0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims.")
    pod["spec"]["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]
    runs = k8s.claim("runs", "Pending")
    failed = k8s.event(runs, "ProvisioningFailed", 'storageclass.storage.k8s.io "efs" not found')
    told = why(pod, k8s.seen(pod, claims=[runs], events=[failed]))
    assert any('"efs" not found; mend storage.class_name' in reason for reason in told)
    pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = "corpora"
    assert any("there is no volume 'corpora'" in reason for reason in why(pod, k8s.seen(pod)))


def test_a_volume_held_by_another_node_is_told() -> None:
    pod = k8s.waiting("ContainerCreating")
    stuck = k8s.event(
        pod, "FailedAttachVolume", 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) x'
    )
    assert "storage.shared" in " ".join(why(pod, k8s.seen(pod, events=[stuck])))


def test_a_quota_keeps_pods_from_being_made() -> None:
    message = (
        'pods "train-pylib-1-0" is forbidden: exceeded quota: quota, requested: requests.nvidia.com/gpu=8, '
        "used: requests.nvidia.com/gpu=8, limited: requests.nvidia.com/gpu=8"
    )
    job = k8s.job()
    line = only(k8s.seen(jobs=[job], events=[k8s.event(job, "FailedCreate", message)]))
    assert line.state == "waiting"
    assert "asks for requests.nvidia.com/gpu=8" in line.says[0]
    assert "raise tenancy.quota" in line.says[0]
    # Once its pods are there, the event is history.
    pod = k8s.running("train-0", labels=k8s.GANG)
    assert only(k8s.seen(pod, jobs=[job], events=[k8s.event(job, "FailedCreate", message)])).says == ()


def test_pod_security_is_told_by_what_it_forbids() -> None:
    text = 'pods "x" is forbidden: violates PodSecurity "restricted:latest": hostPath volumes (volume "here")'
    assert "hostPath volumes" in why_forbidden(text)


def test_a_stage_that_waits_for_the_one_before_says_for_what() -> None:
    pod = k8s.placed(
        k8s.pod("train-0", labels=k8s.GANG, initContainerStatuses=[{"name": "wait", "state": {"running": {}}}])
    )
    pod["spec"]["initContainers"] = [
        {"name": "wait", "command": ["python", "-m", "trainer.wait", "/data/abc/manifest.json"]}
    ]
    line = only(k8s.seen(pod, jobs=[k8s.job()]))
    assert (line.state, line.ready, line.wanted) == ("waiting", 0, 1)
    assert "waits for /data/abc/manifest.json" in line.says[0]


@pytest.mark.parametrize(
    ("status", "state", "says"),
    [
        ({"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}, "done", ""),
        (
            {"failed": 1, "conditions": [{"type": "Failed", "status": "True", "reason": "PodFailurePolicy"}]},
            "failing",
            "another try would fail the same way",
        ),
        (
            {"failed": 7, "conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]},
            "failing",
            "7 failed pods so far",
        ),
    ],
)
def test_a_job_says_how_it_ended(status: dict[str, Any], state: str, says: str) -> None:
    line = only(k8s.seen(jobs=[k8s.job(**status)]))
    assert line.state == state
    assert says in " ".join(line.says)


def test_a_job_that_tries_again_says_why_it_failed_before() -> None:
    broken = k8s.placed(k8s.pod("train-0-a", labels=k8s.GANG, phase="Failed"))
    broken["status"]["containerStatuses"] = [{"name": "train", "state": {"terminated": {"exitCode": 1}}}]
    again = k8s.running("train-0-b", labels=k8s.GANG)
    line = only(k8s.seen(broken, again, jobs=[k8s.job(failed=1)]))
    assert (line.state, line.says) == ("running", ("1 failed pod so far, the last: train failed; see its log",))


def test_a_pod_that_pulls_its_image_says_so() -> None:
    pod = k8s.waiting("ContainerCreating")
    pulling = k8s.event(pod, "Pulling", 'Pulling image "registry.example/serving:abc"')
    assert why(pod, k8s.seen(pod, events=[pulling])) == ['pulls image "registry.example/serving:abc"']


@pytest.mark.parametrize(
    ("status", "state", "says"),
    [
        ({}, "ready", ""),
        ({"observedGeneration": 2}, "rolling", "has not been taken up yet"),
        ({"replicas": 3, "updatedReplicas": 1}, "rolling", "1 of 2 on the new version, 2 of the version before"),
        ({"replicas": 0, "updatedReplicas": 0, "readyReplicas": 0}, "waiting", ""),
        (
            {
                "replicas": 3,
                "updatedReplicas": 1,
                "conditions": [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}],
            },
            "failing",
            "no new pod got ready within 900 s; 2 of the version before go on serving",
        ),
    ],
)
def test_a_roll_out_says_where_it_stands(status: dict[str, Any], state: str, says: str) -> None:
    line = only(k8s.seen(deployments=[k8s.deployment(**status)]))
    assert line.state == state
    assert says in " ".join(line.says)


def test_a_server_without_a_model_is_waiting_and_not_failing() -> None:
    snapshot = k8s.seen(k8s.running(ready=False), deployments=[k8s.deployment(wanted=1, readyReplicas=0)])
    assert only(snapshot).state == "waiting"
    assert "until the channel has a model" in only(snapshot).says[0]


def test_pods_that_say_the_same_are_counted() -> None:
    pods = [k8s.unscheduled("0/1 nodes are available: 1 Insufficient cpu.", name=f"chat-{n}") for n in range(3)]
    line = only(k8s.seen(*pods, deployments=[k8s.deployment(wanted=3, readyReplicas=0)]))
    assert [said for said in line.says if said.endswith("(3 pods)")]


@pytest.mark.parametrize(
    ("scaler", "says"),
    [
        (k8s.autoscaler(), "slipway_serve_requests_in_flight 3.5 (8 wanted); 2 of 1 to 3 replicas"),
        (k8s.autoscaler(desired=3), "wants 3"),
        (k8s.autoscaler(measured=None), "not measured (8 wanted)"),
        (
            k8s.autoscaler(
                conditions=[
                    {
                        "type": "ScalingActive",
                        "status": "False",
                        "reason": "FailedGetPodsMetric",
                        "message": "unable to get metric",
                    }
                ]
            ),
            "the autoscaler sees nothing: unable to get metric; is the adapter of Prometheus",
        ),
        (
            k8s.autoscaler(
                conditions=[
                    {"type": "ScalingActive", "status": "True"},
                    {"type": "ScalingLimited", "status": "True", "reason": "TooManyReplicas"},
                ]
            ),
            "may not: max_replicas is 3",
        ),
    ],
)
def test_an_autoscaler_says_what_it_sees(scaler: dict[str, Any], says: str) -> None:
    assert says in " ".join(only(k8s.seen(deployments=[k8s.deployment()], autoscalers=[scaler])).says)


def test_what_keda_measures_has_its_own_name() -> None:
    snapshot = k8s.seen(
        deployments=[k8s.deployment()], autoscalers=[k8s.keda_autoscaler()], scaled_objects=[k8s.scaled_object()]
    )
    says = " ".join(only(snapshot).says)
    assert "slipway_serve_requests_in_flight by KEDA 3.5 (8 wanted); 2 of 1 to 3 replicas" in says


@pytest.mark.parametrize(
    ("scaled", "replicas", "says"),
    [
        (
            k8s.scaled_object(ready={"status": "False", "message": "no such host"}),
            2,
            "no such host; does Prometheus answer at http://prometheus-operated.monitoring:9090?",
        ),
        (k8s.scaled_object() | {"status": {}}, 2, "is KEDA there?"),
        (k8s.scaled_object(Paused="True"), 2, "is paused"),
        (k8s.scaled_object(Fallback="True"), 2, "keeps to its fallback"),
        (k8s.scaled_object(least=0), 0, "the next one brings it back"),
    ],
)
def test_keda_says_what_holds_it(scaled: dict[str, Any], replicas: int, says: str) -> None:
    snapshot = k8s.seen(deployments=[k8s.deployment(wanted=replicas)], scaled_objects=[scaled])
    assert says in " ".join(only(snapshot).says)


def test_a_full_quota_and_an_unbound_volume_have_lines_of_their_own() -> None:
    quota = {
        "metadata": {"name": "quota"},
        "status": {"hard": {"pods": "20", "cpu": "8"}, "used": {"pods": "20", "cpu": "2"}},
    }
    volume, full = explain(k8s.seen(claims=[k8s.claim("data", "Pending"), k8s.claim("runs", "Bound")], quotas=[quota]))
    assert (volume.what, volume.state) == ("volume/data", "waiting")
    assert full.says == ("pods: all of 20 used",)


METRICS = """# HELP slipway_train_step Optimizer steps done.
# TYPE slipway_train_step gauge
slipway_train_step 320.0
slipway_train_steps 1600.0
slipway_train_loss 3.4117
slipway_train_tokens_total 327680.0
slipway_train_goodput_ratio 0.971
slipway_train_last_checkpoint_step 200.0
slipway_train_step_to_planned_ratio 1.04
slipway_train_communication_seconds{collective="all_reduce"} 0.1
"""


def test_a_run_is_told_by_its_metrics_and_else_by_its_log() -> None:
    told = str(from_metrics(METRICS, pod="train-0"))
    for words in (
        "step 320 of 1,600",
        "loss 3.412",
        "checkpoint at step 200",
        "goodput 97%",
        "1.04 × the planned time",
    ):
        assert words in told
    lines = [
        "plain",
        '{"event": "done"}',
        '{"event": "progress", "stage": "train", "step": 7, "total": 9, "loss": 2.5}',
        "[]",
    ]
    assert str(from_log(lines, pod="train-0")) == "step 7 of 9 · loss 2.500"
    assert "no checkpoint yet" in str(Training(pod="x", step=1, last_checkpoint_step=0))


def test_rank_0_is_asked_and_no_other() -> None:
    first = k8s.running("train-0", labels=k8s.GANG)
    second = k8s.running("train-1", labels=k8s.GANG | {"batch.kubernetes.io/job-completion-index": "1"})
    assert rank_0(k8s.seen(second, first)) is first
    assert rank_0(k8s.seen(second)) is None
    assert rank_0(k8s.seen(k8s.pod("train-0", labels=k8s.GANG))) is None
