"""What each stage of a training computes, and the digest that names its output: pure functions of the spec.

A stage's digest covers what determines its output: its config, the content of its image, the digests of what it reads. It
does not cover where and how wide it runs (nodes, ranks, layout, resources, restarts): `global_batch` fixes the arithmetic up
to the rounding of floats, so that a run spread over more nodes is the same run, gone on with from its checkpoint, and a
finished one is not paid for again. So a change re-runs what it touches, and nothing else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from infra.catalog import Instance
from infra.components.common import digest, plain
from infra.components.places import Place, path_of, places_of
from infra.spec import Located, Parallelism, PodResources, Training
from infra.spec.data import TEXT
from infra.spec.learning import Recover

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
    data_places: tuple[Place, ...]
    """What the data program reads by path; the others below likewise."""
    train_places: tuple[Place, ...]
    evaluate_places: tuple[Place, ...]
    data_words: tuple[str, ...]
    """Its arguments `key=value`: config files hold no paths, so what has one is told so."""
    train_words: tuple[str, ...]
    checkpoints: str | None
    """Where a run's checkpoints go, if not beside the run: a directory of their own for each run."""
    evaluate_words: tuple[str, ...]
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

    def run_of(self, launch: int) -> str:
        """The run of one launch; the first one's is what is judged."""
        return f"{self.run}-{launch}" if launch else self.run

    def words_of(self, launch: int) -> tuple[str, ...]:
        """Arguments of the training program in one launch."""
        paths = (f"data={self.dataset}", f"run={self.run_of(launch)}", *self.train_words)
        if self.checkpoints is None:
            return paths
        return (*paths, f"checkpoints={self.checkpoints}" + (f"-{launch}" if launch else ""))

    @property
    def evaluation(self) -> str:
        return f"{self.run}/evaluation-{self.evaluate_digest}"


def pipeline(
    training: Training, *, image_digest: str, registry_url: str, expected: Mapping[str, float] | None = None
) -> Pipeline:
    """Configs and digests of `training`; `image_digest` is that of the trainer's content, `expected` what the planner thinks of
    a rank (the trainer's `plan`), which decides nothing and is in no digest."""
    base = [plain(training.base.model_dump(mode="json", exclude={"shape"}))] if training.base else []
    data, train, evaluate, publish = _data(training), _train(training), _evaluate(training), _publish(training)
    data_digest = digest(["data", data, image_digest, *base])
    train_digest = digest(["train", train, image_digest, data_digest, *base])
    evaluate_digest = digest(["evaluate", evaluate, image_digest, train_digest])
    target = [registry_url, training.name, training.channel]
    base_words = (f"base={path_of(training.base)}",) if training.base else ()
    tune = [training.base] if training.base else []
    # Adapters are a model, and measured, only with their base.
    beside = training.exports_adapters
    data_config, data_words = _without_paths(data)
    evaluate_config, evaluate_words = _without_paths(evaluate)
    aside = _layout(training.layout) | _aside(training) | ({"plan": dict(expected)} if expected else {})
    return Pipeline(
        data=data_config,
        train=train | aside,
        evaluate=evaluate_config,
        publish=publish,
        data_places=places_of([*(s for _, s in training.data.sources if isinstance(s, Located)), *tune]),
        train_places=places_of(tune),
        evaluate_places=places_of([*training.evaluate.located.values(), *(tune if beside else [])]),
        data_words=(*data_words, *base_words),
        train_words=base_words,
        checkpoints=_checkpoints(training, train_digest),
        evaluate_words=(*evaluate_words, *(base_words if beside else ())),
        data_digest=data_digest,
        train_digest=train_digest,
        evaluate_digest=evaluate_digest,
        promote_digest=digest(["promote", publish, image_digest, evaluate_digest, target]),
    )


def _data(training: Training) -> Json:
    config = plain(training.data.model_dump(mode="json"))
    _drop(config, mixture=[], task=TEXT.model_dump())
    if training.base:
        del config["vocab_size"]  # the package's own
    return config


def _train(training: Training) -> Json:
    """What decides the weights, with how often it is saved and logged."""
    own = [
        "seq",
        "global_batch",
        "micro_batch",
        "steps",
        "optim",
        "dtype",
        "seed",
        "document_mask",
        "lora",
        "local_sgd",
    ]
    if not training.base:
        own.append("model")  # else the package's own
    config = plain(training.model_dump(mode="json", include={*own, "checkpoint", "log_every_steps"}))
    config["checkpoint"].pop("url", None)  # where it is kept decides nothing; the program is told by a word
    _drop(config, document_mask=False)
    _drop(config.get("model", {}), family="llama")
    _drop(config.get("lora", {}), export="merged")
    return config


def _aside(training: Training) -> Json:
    """What decides no weight, where it is not as the trainer has it by itself."""
    config = plain(training.model_dump(mode="json", include={"recover", "sinks", "look_at_traffic_every_steps"}))
    _drop(config, recover=plain(Recover().model_dump(mode="json")), sinks=[])
    return config


def _checkpoints(training: Training, digest: str) -> str | None:
    url = training.checkpoint.url
    return None if url is None else f"{url.rstrip('/')}/{digest}"


def _evaluate(training: Training) -> Json:
    config = plain(training.evaluate.model_dump(mode="json"))
    _drop(config, tasks=[])
    return config


def _publish(training: Training) -> Json:
    gate = plain(training.gate.model_dump(mode="json"))
    _drop(gate, min_accuracy={})
    # Left out, it would be the trainer's own: a gate that asks for more than was declared.
    return {"gate": {"must_beat": None} | gate}


def _drop(config: Json, **defaults: Any) -> None:
    """Takes out keys whose value is the program's own default: what a stack does not say makes no new digest."""
    for key, default in defaults.items():
        if config.get(key) == default:
            del config[key]


def _without_paths(declared: Json) -> tuple[Json, tuple[str, ...]]:
    """A config as its file has it, and as words what of it lies in a mounted place.

    A word holds a whole key as JSON, since words do not reach into lists; in a word, a runner can rewrite paths.
    """
    seen = {key: _as_programs_see(value) for key, value in declared.items()}
    words = {key: value for key, (value, mounted) in seen.items() if mounted}
    kept = {key: value for key, (value, mounted) in seen.items() if not mounted}
    return kept, tuple(f"{key}={json.dumps(value, ensure_ascii=False, sort_keys=True)}" for key, value in words.items())


def _as_programs_see(value: Any) -> tuple[Any, bool]:
    """`value` with every path as the programs open it, and whether one of them is mounted."""
    if isinstance(value, list):
        found = [_as_programs_see(inner) for inner in cast("list[Any]", value)]
        return [inner for inner, _ in found], any(mounted for _, mounted in found)
    if not isinstance(value, dict):
        return value, False
    config = cast("Json", value)
    if "path" in config:
        located = Located(path=config["path"], volume_claim=config.get("volume_claim"))
        rest = {key: inner for key, inner in config.items() if key != "volume_claim"}
        return rest | {"path": path_of(located)}, located.url is None
    found = {key: _as_programs_see(inner) for key, inner in config.items()}
    return {key: inner for key, (inner, _) in found.items()}, any(mounted for _, mounted in found.values())


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
    if layout.compile:
        wanted["compile"] = True
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
