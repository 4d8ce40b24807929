"""What each stage of a training computes, and the digest that names its output: pure functions of the spec.

A stage's digest covers what determines its output: its config, the content of its image, the digests of what it reads. It
does not cover where and how wide it runs (nodes, ranks, layout, resources, restarts): `global_batch` fixes the arithmetic up
to the rounding of floats, so that a run spread over more nodes is the same run, gone on with from its checkpoint, and a
finished one is not paid for again. So a change re-runs what it touches, and nothing else.
"""

from dataclasses import dataclass
from typing import Any

from infra.catalog import Instance
from infra.components.common import digest, plain
from infra.spec import Parallelism, PodResources, Training

Json = dict[str, Any]

# What a node of a pool keeps for DaemonSets (CNI, CSI, device plugin, exporters, log agent), besides what kubelet reserves.
DAEMONSETS = PodResources(cpus=1, memory_gib=2)
# Data preparation and promotion ask for no GPU. Each gets an eighth of a node, and at most this.
HELPER_MOST = PodResources(cpus=8, memory_gib=32)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Configs of the four programs, and the digests that name datasets, runs, evaluations and promotions."""

    data: Json
    train: Json
    evaluate: Json
    publish: Json
    data_digest: str
    train_digest: str
    evaluate_digest: str
    promote_digest: str

    @property
    def dataset(self) -> str:
        return f"/data/{self.data_digest}"

    @property
    def run(self) -> str:
        return f"/runs/{self.train_digest}"

    @property
    def evaluation(self) -> str:
        return f"{self.run}/evaluation-{self.evaluate_digest}"


def pipeline(training: Training, *, image_digest: str, registry_url: str) -> Pipeline:
    """Configs and digests of `training`; `image_digest` is that of the trainer's content."""
    data = plain(training.data.model_dump(mode="json"))
    train = _train(training)
    evaluate = plain(training.evaluate.model_dump(mode="json"))
    publish = {"gate": plain(training.gate.model_dump(mode="json"))}
    data_digest = digest(["data", data, image_digest])
    train_digest = digest(["train", train, image_digest, data_digest])
    evaluate_digest = digest(["evaluate", evaluate, image_digest, train_digest])
    target = [registry_url, training.name, training.channel]
    return Pipeline(
        data=data,
        train=train | _layout(training.layout),
        evaluate=evaluate,
        publish=publish,
        data_digest=data_digest,
        train_digest=train_digest,
        evaluate_digest=evaluate_digest,
        promote_digest=digest(["promote", publish, image_digest, evaluate_digest, target]),
    )


def _train(training: Training) -> Json:
    keys = {
        "model",
        "seq",
        "global_batch",
        "micro_batch",
        "steps",
        "optim",
        "dtype",
        "seed",
        "checkpoint",
        "log_every_steps",
    }
    return plain(training.model_dump(mode="json", include=keys))


def _layout(layout: Parallelism) -> Json:
    """The trainer's `parallelism`, where ranks do more than share the batch: the replicas are what it leaves of the world."""
    if layout == Parallelism():
        return {}
    names = {"dp_shard": layout.fsdp, "tp": layout.tp, "pp": layout.pp, "cp": layout.cp}
    wanted: Json = {key: value for key, value in names.items() if value > 1}
    if layout.vpp > 1:
        wanted |= {"pp_schedule": "interleaved", "pp_stages_per_rank": layout.vpp}
    if layout.recompute != "none":
        wanted["recompute"] = layout.recompute
    return {"parallelism": wanted}


def helper_resources(training: Training, machine: Instance) -> PodResources:
    """CPU and memory of the data and the promotion pod: never more than a training pod's own."""
    bound = training.resources or PodResources(
        cpus=machine.allocatable_cpus / 8, memory_gib=machine.allocatable_gib / 8
    )
    cpus, memory_gib = min(bound.cpus, HELPER_MOST.cpus), min(bound.memory_gib, HELPER_MOST.memory_gib)
    return PodResources(cpus=_floor(cpus), memory_gib=_floor(memory_gib))


def training_resources(training: Training, machine: Instance) -> PodResources:
    """CPU and memory of a training pod: as declared, else a node's allocatable less DaemonSets and both helpers.

    The helpers' share is left free on purpose: training pods wait on their nodes for the data, and a data pod that found no
    room beside them would wait for ever.
    """
    if training.resources:
        return training.resources
    helper = helper_resources(training, machine)
    return PodResources(
        cpus=_floor(machine.allocatable_cpus - DAEMONSETS.cpus - 2 * helper.cpus),
        memory_gib=_floor(machine.allocatable_gib - DAEMONSETS.memory_gib - 2 * helper.memory_gib),
    )


def _floor(amount: float) -> float:
    """Down to a whole number, or to a quarter below two."""
    return int(amount) if amount >= 2 else max(int(amount * 4) / 4, 0.25)
