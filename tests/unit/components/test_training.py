"""The Jobs of a training: restarts, rendezvous, waiting, volumes, placement."""

from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest
import yaml

from infra.checks import check_manifests
from infra.spec import StackError
from trainer.config import TrainConfig

from .conftest import Json, Objects


def main(manifest: Json) -> Json:
    return manifest["spec"]["template"]["spec"]["containers"][0]


def test_disruptions_do_not_count_and_refusals_are_final(stack: Objects) -> None:
    for job in stack.kind("Job"):
        first, second, third = job["spec"]["podFailurePolicy"]["rules"]
        assert (first["action"], first["onPodConditions"]) == (
            "Ignore",
            [{"type": "DisruptionTarget", "status": "True"}],
        )
        assert (second["action"], second["onExitCodes"]) == ("Ignore", {"operator": "In", "values": [75]})
        assert (third["action"], third["onExitCodes"]) == ("FailJob", {"operator": "In", "values": [2]})
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_a_gang_is_one_indexed_job_whose_indexes_try_again_by_themselves(prod: Objects) -> None:
    spec = prod.one("Job", "train")["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (6, 0)
    assert "backoffLimit" not in spec


def test_ranks_meet_at_the_first_pod_before_it_is_ready(prod: Objects) -> None:
    job = prod.one("Job", "train")
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    service = prod.one("Service", name)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == name
    port = next(int(p["containerPort"]) for p in main(job)["ports"] if p["name"] == "rdzv")
    environment = {v["name"]: v.get("value") for v in main(job)["env"]}
    assert environment["RDZV_ENDPOINT"] == f"{name}-0.{name}:{port}"
    assert "--rdzv-endpoint=$(RDZV_ENDPOINT)" in main(job)["command"]
    assert f"--rdzv-id={name}" in main(job)["command"]


APART: Json = {"training.local_sgd": {"every_steps": 50, "launches": 2, "lost_after_s": 30}}


def test_launches_are_gangs_of_their_own_that_meet(rendered: Callable[..., Objects]) -> None:
    stack = rendered("prod", APART)
    one, other = (job for job in stack.kind("Job") if job["metadata"]["name"].startswith("train-"))
    service, place = stack.one("Service", "meet"), stack.one("Deployment", "meet")
    endpoint = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']:.0f}"
    for launch, job in enumerate((one, other)):
        name, words = job["metadata"]["name"], main(job)["command"]
        environment = {v["name"]: v.get("value") for v in main(job)["env"]}
        assert (environment["REPLICA"], environment["MEETING_ENDPOINT"]) == (str(launch), endpoint)
        assert environment["RDZV_ENDPOINT"].startswith(f"{name}-0.{name}:")
        assert stack.one("Service", name)["spec"]["selector"]["app.kubernetes.io/instance"] == name
        assert {"--nnodes=1", f"--rdzv-id={name}"} <= set(words)
        assert job["spec"]["completions"] == 1
        config = TrainConfig.model_validate(yaml.safe_load(stack.one("ConfigMap", name)["data"]["train.yaml"]))
        assert config.local_sgd
        assert (config.local_sgd.launches, config.local_sgd.lost_after_s) == (2, 30)
    runs = [next(w for w in main(job)["command"] if w.startswith("run=")) for job in (one, other)]
    assert runs[1] == f"{runs[0]}-1"
    judged = stack.one("Job", "promote")["spec"]["template"]["spec"]["initContainers"]
    assert f"{runs[0].removeprefix('run=')}/model/slipway.json" in judged[0]["command"]

    container = main(place)
    assert container["command"] == ["python", "-m", "trainer.meeting", "--host", "0.0.0.0"]
    assert {v["name"]: v.get("value") for v in container["env"]}["MEETING_PORT"] == "29400"
    assert place["spec"]["strategy"] == {"type": "Recreate"}
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert stack.one("ServiceAccount", "meet")


def test_the_objects_of_launches_are_what_kubernetes_and_our_own_rules_accept(rendered: Callable[..., Objects]) -> None:
    stack = rendered("prod", APART)
    builtin = [m for m in stack.all if "." not in m["apiVersion"].split("/")[0] or ".k8s.io/" in m["apiVersion"]]
    for manifest in builtin:
        assert kubernetes_validate.validate(manifest, "1.36", strict=True) == "1.36"
    assert len(builtin) > 30
    shipped = {(found.code, found.where) for found in check_manifests(rendered("prod", {}).all)}
    assert [f for f in check_manifests(stack.all) if f.severity == "error" or "meet" in f.where] == []
    assert {found.code for found in check_manifests(stack.all)} <= {code for code, _ in shipped}


def test_one_launch_at_a_time_may_be_drained(rendered: Callable[..., Objects]) -> None:
    values: Json = {"node_pools.0.max_nodes": 6, "training.nodes": 6, "training.global_batch": 192}
    values["training.local_sgd"] = {"every_steps": 50, "launches": 3}
    spec = rendered("prod", values | {"budget": {}}).one("PodDisruptionBudget", "meet")["spec"]
    # Of pods that no controller with a scale has, the API server takes a number and no `maxUnavailable`.
    assert spec["minAvailable"] == 4
    assert spec["selector"]["matchLabels"] == {"app.kubernetes.io/component": "train"}


def test_only_launches_reach_the_place_where_they_meet(rendered: Callable[..., Objects]) -> None:
    stack = rendered("prod", APART)
    answers = stack.one("NetworkPolicy", "meeting-answers-launches")["spec"]
    assert answers["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "meet"}
    assert [peer["podSelector"]["matchLabels"] for peer in answers["ingress"][0]["from"]] == [
        {"app.kubernetes.io/component": "train"}
    ]
    assert [port["port"] for port in answers["ingress"][0]["ports"]] == ["meeting"]
    assert not [n for n in stack.names("NetworkPolicy") if n.startswith("meet-")]
    assert "meeting-answers-launches" not in rendered("prod", {}).names("NetworkPolicy")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"training.nodes": 1},
            r"training.nodes: 1 nodes do not divide by local_sgd.launches 2; the nearest: 2$",
        ),
        ({"training.name": "n" * 40, "training.nodes": 2002}, r"training.name: .* 64 characters, .*; shorten it by 1$"),
        ({"training.local_sgd.overlap_steps": 1}, "would be lost with a launch that dies"),
        ({"training.local_sgd.launches": None}, "lost_after_s: is of replicas that are launches"),
        ({"training.recover": {"bad_step": "skip"}}, "recover.bad_step: goes back alone"),
        ({"training.local_sgd.launches": 1}, "must be at least 2"),
    ],
)
def test_launches_that_cannot_be_are_refused(rendered: Callable[..., Objects], values: Json, says: str) -> None:
    with pytest.raises(StackError, match=says):
        rendered("prod", {"training.local_sgd": dict(APART["training.local_sgd"])} | values)


def test_ranks_are_the_gpus_that_the_pod_holds(prod: Objects, local: Objects) -> None:
    on_gpus, on_cpus = main(prod.one("Job", "train")), main(local.one("Job", "train"))
    assert on_gpus["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "--nproc-per-node=8" in on_gpus["command"]
    assert "nvidia.com/gpu" not in on_cpus["resources"]["limits"]


def test_shared_memory_is_sized(stack: Objects) -> None:
    job = stack.one("Job", "train")
    volume = next(v for v in job["spec"]["template"]["spec"]["volumes"] if v["name"] == "shm")
    assert volume["emptyDir"]["medium"] == "Memory"
    assert volume["emptyDir"]["sizeLimit"] != "64Mi"
    assert "/dev/shm" in {mount["mountPath"] for mount in main(job)["volumeMounts"]}


def test_each_stage_waits_for_what_the_stage_before_it_writes_last(stack: Objects) -> None:
    data, train, promote = (stack.one("Job", stage) for stage in ("data", "train", "promote"))
    dataset = next(w for w in main(data)["command"] if w.startswith("out=")).removeprefix("out=")
    run = next(w for w in main(train)["command"] if w.startswith("run=")).removeprefix("run=")
    assert f"data={dataset}" in main(train)["command"]
    waits = [job["spec"]["template"]["spec"]["initContainers"][0]["command"] for job in (train, promote)]
    assert waits == [
        ["python", "-m", "trainer.wait", f"{dataset}/manifest.json"],
        ["python", "-m", "trainer.wait", f"{run}/model/slipway.json"],
    ]
    evaluate = promote["spec"]["template"]["spec"]["initContainers"][1]["command"]
    assert {f"model={run}/model", f"data={dataset}"} <= set(evaluate)
    report = next(w for w in evaluate if w.startswith("out=")).removeprefix("out=") + "/evaluation.json"
    assert f"report={report}" in main(promote)["command"]


def test_only_training_asks_for_gpus(prod: Objects) -> None:
    for stage in ("data", "promote"):
        pod = prod.one("Job", stage)["spec"]["template"]["spec"]
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert "nvidia.com/gpu" not in container["resources"]["limits"]
        assert "nodeSelector" not in pod
        assert [toleration["value"] for toleration in pod["tolerations"]] == ["train"]


def test_pods_find_their_pool_and_tolerate_its_taint(prod: Objects) -> None:
    wanted = {"train": prod.one("Job", "train"), "serve": prod.one("Deployment", "chat")}
    for pool, manifest in wanted.items():
        pod = manifest["spec"]["template"]["spec"]
        nodes = prod.one("NodePool", f"slipway-prod-{pool}")["spec"]["template"]
        assert pod["nodeSelector"].items() <= nodes["metadata"]["labels"].items()
        taint = nodes["spec"]["taints"][0]
        assert {"operator": "Equal", **taint} in pod["tolerations"]


def test_nodes_that_are_there_already_need_no_selector(local: Objects) -> None:
    for pod in local.pods():
        assert not {"nodeSelector", "tolerations", "affinity"} & pod["spec"].keys()


def test_config_files_hold_what_the_trainer_reads_and_no_paths(local: Objects) -> None:
    def config(stage: str, file: str) -> Any:
        return yaml.safe_load(local.one("ConfigMap", local.one("Job", stage)["metadata"]["name"])["data"][file])

    assert config("data", "data.yaml") == {
        "source": {"kind": "python-stdlib"},
        "vocab_size": 2048,
        "held_out": 0.05,
        "seed": 0,
    }
    assert config("train", "train.yaml").keys() == {
        "model", "seq", "global_batch", "micro_batch", "steps", "optim", "dtype", "seed", "checkpoint", "log_every_steps",
        "plan",
    }  # fmt: skip
    assert config("promote", "publish.yaml") == {"gate": {"must_beat": "trigram"}}
    assert config("promote", "evaluate.yaml").keys() == {"max_tokens", "baselines", "sample"}
    for stage, file in (("data", "data.yaml"), ("train", "train.yaml"), ("promote", "evaluate.yaml")):
        assert "/" not in yaml.safe_dump(config(stage, file)).replace("/n", "")


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({"fsdp": 8}, {"dp_shard": 8}),
        ({"tp": 2, "fsdp": 4, "recompute": "selective"}, {"tp": 2, "dp_shard": 4, "recompute": "selective"}),
        ({"pp": 2, "vpp": 2}, {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}),
    ],
)
def test_a_layout_reaches_the_trainer_and_makes_no_new_run(
    prod: Objects, rendered: Callable[..., Objects], layout: dict[str, Any], ranks: dict[str, Any]
) -> None:
    other = rendered("prod", {"training.parallelism": layout})
    name = other.one("Job", "train")["metadata"]["name"]
    assert name == prod.one("Job", "train")["metadata"]["name"]
    config = yaml.safe_load(other.one("ConfigMap", name)["data"]["train.yaml"])
    # The trainer's own reader takes it: the two packages share nothing but this file.
    read = TrainConfig.model_validate(config).parallelism
    assert read.model_dump(include=set(ranks)) == ranks


def test_volumes_of_several_nodes_are_shared(prod: Objects, local: Objects) -> None:
    assert {tuple(c["spec"]["accessModes"]) for c in prod.kind("PersistentVolumeClaim")} == {("ReadWriteMany",)}
    assert {tuple(c["spec"]["accessModes"]) for c in local.kind("PersistentVolumeClaim")} == {("ReadWriteOnce",)}


def test_a_volume_is_the_registry_where_there_is_no_object_store(prod: Objects, local: Objects) -> None:
    assert "registry" in local.names("PersistentVolumeClaim")
    assert "registry" not in prod.names("PersistentVolumeClaim")
    publish = main(local.one("Job", "promote"))
    assert "registry=file:///registry" in publish["command"]
    server = main(local.one("Deployment", "chat"))
    mount = next(m for m in server["volumeMounts"] if m["mountPath"] == "/registry")
    assert mount["readOnly"] is True


def test_only_pods_that_open_the_object_store_have_an_identity(prod: Objects) -> None:
    with_identity = {a["metadata"]["name"] for a in prod.kind("ServiceAccount") if "annotations" in a["metadata"]}
    assert with_identity == {"data", "promote", "serve"}


def test_the_pool_keeps_its_least_nodes_and_ends_at_its_most(prod: Objects, rendered: Callable[..., Objects]) -> None:
    assert prod.one("NodePool", "slipway-prod-train")["spec"]["limits"] == {"nvidia.com/gpu": "16"}
    keeper = prod.one("Deployment", "keep-serve")
    assert keeper["spec"]["replicas"] == 2
    # One a node, and nothing that real pods would miss.
    assert keeper["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]
    assert "nvidia.com/gpu" not in main(keeper)["resources"]["limits"]
    assert rendered("prod", {"node_pools.1.min_nodes": 0}).names("Deployment") == {"chat", "router"}


def test_kept_nodes_have_the_images_before_a_pod_needs_them(prod: Objects) -> None:
    keeper, server = prod.one("Deployment", "keep-serve"), prod.one("Deployment", "chat")
    pulled = [container["image"] for container in keeper["spec"]["template"]["spec"]["initContainers"]]
    assert pulled == [main(server)["image"]]


def test_training_nodes_are_taken_away_only_when_empty(prod: Objects) -> None:
    disruption = prod.one("NodePool", "slipway-prod-train")["spec"]["disruption"]
    assert disruption["consolidationPolicy"] == "WhenEmpty"
    template = prod.one("Job", "train")["spec"]["template"]
    assert template["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"
