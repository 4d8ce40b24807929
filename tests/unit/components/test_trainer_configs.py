"""What a stack says of data, training and judging reaches the trainer: rendered files and words, read by its own config classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.catalog import instance
from infra.checks import Refused
from infra.components.pipeline import pipeline
from infra.planner import plan
from infra.planner.run import Layout
from infra.planner.trainable import obstacle
from infra.planner.training import TRAINER, TrainingPlan, plan_training
from infra.render import run
from infra.spec import Data, Evaluate, Gate, ModelShape, Optim, StackError, Training, load
from infra.spec.learning import Recover
from trainer.command import load_config
from trainer.config import (
    EvaluateConfig,
    GateConfig,
    ModelConfig,
    OptimConfig,
    PublishConfig,
    RecoverConfig,
    TrainConfig,
)
from trainer.data.config import DataConfig
from trainer.errors import Refused as TrainerRefused
from trainer.layout import fit_dataset, layout_of
from trainer.loss import LOGITS_AT_ONCE

from .conftest import NAMES, Json, Objects

CONFIGS = {"data": DataConfig, "train": TrainConfig, "evaluate": EvaluateConfig, "publish": PublishConfig}


def container_of(objects: Objects, program: str) -> Json:
    pod = objects.one("Job", "promote" if program in ("evaluate", "publish") else program)["spec"]["template"]["spec"]
    return next(c for c in [*pod.get("initContainers", []), *pod["containers"]] if c["name"] == program)


class Told:
    """What the programs of a stack's training are told, as each of them reads it."""

    def __init__(self, path: Path) -> None:
        training = plan(load(path)).stack.training
        assert training
        self.pipeline = pipeline(training, image_digest="content", registry_url="file:///registry")
        self._folder = path.parent

    def read(self, program: str, known: Json | None = None) -> Any:
        """By the program's own reader, from its config file and the words of its command line."""
        file = self._folder / f"{program}.yaml"
        file.write_text(yaml.safe_dump(json.loads(json.dumps(getattr(self.pipeline, program)))))
        words = dict(word.split("=", 1) for word in getattr(self.pipeline, f"{program}_words", ()))
        words.pop("base", None)
        return load_config(CONFIGS[program], file, words, known)


@pytest.fixture
def told(changed: Callable[..., Path]) -> Callable[..., Told]:
    return lambda stack, values: Told(changed(stack, values))


@pytest.mark.parametrize("stack", NAMES)
def test_what_a_stack_does_not_say_is_the_trainers_own(told: Callable[..., Told], stack: str) -> None:
    programs = told(stack, {})
    assert not {"lora", "local_sgd", "recover", "sinks", "document_mask"} & programs.pipeline.train.keys()
    assert programs.read("train").recover == TrainConfig.model_fields["recover"].default
    assert programs.read("data").task.kind == "text"
    assert not programs.read("evaluate").tasks
    assert programs.read("publish").gate.must_beat


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ({"kind": "jsonl", "path": "s3://b/rows", "glob": "*.jsonl.gz"}, "jsonl"),
        ({"kind": "parquet", "path": "gs://b/rows"}, "parquet"),
        ({"kind": "datasets", "path": "abfs://b/split"}, "datasets"),
        ({"kind": "text", "path": "https://example.org/corpus.txt"}, "text"),
    ],
)
def test_every_kind_of_source_reaches_the_data_program(told: Callable[..., Told], source: Json, kind: str) -> None:
    read_source = told("dev", {"training.data.source": source}).read("data").source
    assert read_source.model_dump(include=source.keys()) == source
    assert read_source.kind == kind


def test_a_mixture_keeps_its_weights_and_a_volume_is_mounted_where_its_path_says(
    rendered: Callable[..., Objects], told: Callable[..., Told]
) -> None:
    mixture = [
        {"name": "code", "weight": 3, "source": {"kind": "jsonl", "path": "code", "volume_claim": "corpora"}},
        {"name": "web", "weight": 1, "source": {"kind": "parquet", "path": "s3://b/web"}},
    ]
    values = {"training.data.source": None, "training.data.mixture": mixture}
    parts = told("dev", values).read("data").mixture
    assert [(part.name, part.weight) for part in parts] == [("code", 3), ("web", 1)]
    objects = rendered("dev", values)
    assert container_of(objects, "data")["command"][-1].startswith("mixture=[")
    mount = next(m for m in container_of(objects, "data")["volumeMounts"] if m["name"] == "from-corpora")
    assert parts[0].source.path == f"{mount['mountPath']}/code"
    assert mount["readOnly"] is True
    volumes = objects.one("Job", "data")["spec"]["template"]["spec"]["volumes"]
    claim = next(v["persistentVolumeClaim"] for v in volumes if v["name"] == "from-corpora")
    assert claim == {"claimName": "corpora"}
    assert parts[1].source.path == "s3://b/web"
    # The part in the object store is opened by a pod that may.
    assert "data-reaches-object-store" in objects.names("NetworkPolicy")


def test_a_directory_of_this_machine_is_mounted_here_and_refused_elsewhere(
    changed: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    values = {"training.data.source": {"kind": "text", "path": str(corpus)}}
    with pytest.raises(Refused, match=f"there is no {corpus}"):
        run(changed("local", values), here=True)
    corpus.mkdir()
    objects = Objects(run(changed("local", values), here=True))
    mount = container_of(objects, "data")["volumeMounts"][-1]
    volumes = objects.one("Job", "data")["spec"]["template"]["spec"]["volumes"]
    assert {"name": mount["name"], "hostPath": {"path": str(corpus)}} in volumes
    assert Told(changed("local", values)).read("data").source.path == mount["mountPath"]
    with pytest.raises(Refused, match=r"SLW309.*volume_claim"):
        run(changed("local", values))


CHAT: Json = {
    "training.data.source": {"kind": "jsonl", "path": "s3://b/chats"},
    "training.data.task": {"kind": "chat", "field": "turns"},
    "training.gate": {"must_beat": None, "max_bits_per_byte": 1.5},
}
CLASSES: Json = {
    "training.data.source": {"kind": "parquet", "path": "s3://b/rows"},
    "training.data.task": {"kind": "classify", "labels": ["spam", "ham"]},
    "training.gate": {"must_beat": None, "min_accuracy": {"classification": 0.8}},
    "training.evaluate": {},
    "services": [],
}


def test_chats_are_learnt_and_gated_without_a_baseline(told: Callable[..., Told]) -> None:
    programs = told("dev", CHAT)
    assert programs.read("data").task.field == "turns"
    gate = programs.read("publish").gate
    assert (gate.must_beat, gate.max_bits_per_byte) == (None, 1.5)


def test_classes_are_learnt_and_gated_by_accuracy(told: Callable[..., Told]) -> None:
    programs = told("dev", CLASSES)
    assert programs.read("data").task.labels == ("spam", "ham")
    assert programs.read("publish").gate.min_accuracy == {"classification": 0.8}


def test_questions_are_mounted_for_the_evaluation_and_named_by_the_gate(
    rendered: Callable[..., Objects], told: Callable[..., Told]
) -> None:
    tasks = [
        {"kind": "multiple_choice", "name": "arc", "path": "s3://b/arc.jsonl", "max_rows": 50},
        {"kind": "exact_match", "name": "sums", "path": "sums.jsonl", "volume_claim": "questions", "max_tokens": 8},
    ]
    values = {"training.evaluate.tasks": tasks, "training.gate.min_accuracy": {"arc": 0.3}}
    arc, sums = told("dev", values).read("evaluate").tasks
    assert (arc.path, arc.max_rows) == ("s3://b/arc.jsonl", 50)
    assert sums.path == "/from/questions/sums.jsonl"
    objects = rendered("dev", values)
    assert "/from/questions" in {m["mountPath"] for m in container_of(objects, "evaluate")["volumeMounts"]}
    assert told("dev", values).read("publish").gate.min_accuracy == {"arc": 0.3}
    assert "promote-reaches-object-store" in objects.names("NetworkPolicy")


def test_tasks_of_the_harness_are_fetched_or_lie_in_a_volume(
    told: Callable[..., Told], rendered: Callable[..., Objects]
) -> None:
    tasks = [
        {"kind": "lm_eval", "name": "arc", "task": "arc_easy", "metric": "acc_norm", "few_shot": 2},
        {"kind": "lm_eval", "name": "own", "task": "ours", "path": "tasks", "volume_claim": "questions"},
    ]
    values = {"training.evaluate.tasks": tasks, "training.gate.min_accuracy": {"own": 0.2}}
    arc, own = told("dev", values).read("evaluate").tasks
    assert (arc.task, arc.metric, arc.few_shot, arc.path) == ("arc_easy", "acc_norm", 2, None)
    assert own.path == "/from/questions/tasks"
    assert "promote-reaches-object-store" in rendered("dev", values).names("NetworkPolicy")


SHAPE: Json = {"layers": 2, "hidden": 96, "heads": 4, "kv_heads": 2, "ffn": 256, "max_context": 128}
TUNED: Json = {
    "training.base": {"path": "llama", "volume_claim": "models", "shape": "llama3-8b"},
    "training.data.source": {"kind": "jsonl", "path": "s3://b/chats"},
    "training.data.vocab_size": None,
    "training.lora": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
    "training.micro_batch": 1,
    "training.steps": 1000,
    "training.optim.warmup_steps": 100,
}


def tuned(changed: Callable[..., Path], values: Json | None = None) -> Path:
    """prod, tuning a package whose shape the catalogue knows."""
    path = changed("prod", TUNED | (values or {}))
    document = yaml.safe_load(path.read_text())
    del document["config"]["slipway:training"]["model"]
    del document["config"]["slipway:training"]["data"]["vocab_size"]
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_base_package_gives_shape_and_tokenizer_and_its_adapters_are_trained(
    changed: Callable[..., Path],
) -> None:
    objects = Objects(run(tuned(changed)))
    for program in ("data", "train"):
        assert "base=/from/models/llama" in container_of(objects, program)["command"]
        assert "/from/models" in {m["mountPath"] for m in container_of(objects, program)["volumeMounts"]}
    programs = Told(tuned(changed))
    assert "vocab_size" not in programs.pipeline.data
    assert "model" not in programs.pipeline.train
    # As from the package's config.json, which the trainer itself reads: the file leaves the shape out.
    train = programs.read("train", {"model": SHAPE | {"max_context": 4096}})
    assert (train.lora.rank, train.lora.alpha, train.lora.targets) == (8, 16, ("q_proj", "v_proj"))


def test_adapters_are_published_apart_and_measured_with_their_base(changed: Callable[..., Path]) -> None:
    apart = {"training.lora": TUNED["training.lora"] | {"export": "adapters"}}
    beside = {"services.0.model": "llama3-8b", "services.0.adapters": [{"name": "support", "model": "code-1b"}]}
    merged, made = Told(tuned(changed)), Told(tuned(changed, apart | beside))
    known = {"model": SHAPE | {"max_context": 4096}}
    assert made.read("train", known).lora.export == "adapters"
    assert merged.read("train", known).lora.export == "merged"
    assert "export" not in merged.pipeline.train["lora"]  # what a stack does not say makes no new digest
    assert made.pipeline.train_digest != merged.pipeline.train_digest
    for objects, has_base in (
        (Objects(run(tuned(changed, apart | beside))), True),
        (Objects(run(tuned(changed))), False),
    ):
        container = container_of(objects, "evaluate")
        assert ("base=/from/models/llama" in container["command"]) is has_base
        assert ("/from/models" in {m["mountPath"] for m in container["volumeMounts"]}) is has_base
        promote = objects.one("Job", "promote")["spec"]["template"]["spec"]["volumes"]
        assert ("from-models" in {volume["name"] for volume in promote}) is has_base


@pytest.mark.parametrize(
    ("values", "key", "says"),
    [
        ({"training.lora": {"export": "adapter"}}, "training.lora.export", "did you mean `adapters`"),
        ({"training.lora": {"export": "adapters"}}, "services.0.model", "no model by itself; name its base"),
        (
            {"services.0.model": "base", "services.0.adapters": [{"name": "a", "model": "code-1b"}]},
            "services.0.adapters.0.model",
            "set training.lora.export: adapters",
        ),
    ],
)
def test_adapters_are_served_beside_their_base_and_models_alone(
    changed: Callable[..., Path], values: Json, key: str, says: str
) -> None:
    with pytest.raises(StackError) as refused:
        load(tuned(changed, values))
    assert f"slipway:{key}: " in str(refused.value)
    assert says in str(refused.value)


def test_adapters_need_less_memory_than_the_whole(changed: Callable[..., Path]) -> None:
    stack = plan(load(tuned(changed))).stack
    training = stack.training
    assert training
    assert (training.shape.layers, training.data.vocab_size) == (32, 128256)
    machine = instance("p5.48xlarge")
    pool = stack.pool(training.pool)
    whole = plan_training(training.model_copy(update={"lora": None}), pool=pool, instance=machine)
    adapters = plan_training(training, pool=pool, instance=machine)
    state = "weights, gradients, optimizer"
    # r·(in + out) of q and v in each layer: 32 · 8 · ((4096 + 4096) + (4096 + 1024)), 16 bytes each; 4 for each frozen weight.
    expected = (4 * whole.parameters + 16 * 32 * 8 * (8192 + 5120)) / 2**30
    assert adapters.memory.parts[state] == pytest.approx(expected, rel=0.01)
    assert adapters.memory.value < 0.5 * whole.memory.value
    assert adapters.step.value < whole.step.value


def test_replicas_that_train_apart_keep_more_and_send_less(changed: Callable[..., Path]) -> None:
    def planned(values: Json) -> TrainingPlan:
        found = plan(load(changed("prod", values))).training
        assert found
        return found

    together, apart = planned({}), planned({"training.local_sgd": {"every_steps": 100}})
    state = "weights, gradients, optimizer"
    # Four copies of the weights, and of the one fragment how far it came: 20 bytes beside the 16 of AdamW in fp32.
    assert apart.memory.parts[state] / together.memory.parts[state] == pytest.approx((16 + 20) / 16, rel=0.01)
    assert apart.step.parts["gradients and weights"] < 0.2 * together.step.parts["gradients and weights"]


def test_launches_are_planned_as_what_they_are(changed: Callable[..., Path]) -> None:
    def planned(local_sgd: Json | None) -> TrainingPlan:
        found = plan(load(changed("prod", {"training.local_sgd": local_sgd}))).training
        assert found
        return found

    together, apart = planned(None), planned({"every_steps": 100, "launches": 2})
    assert apart.layout == f"2 launches of dp {together.ranks // 2}"
    assert (apart.ranks, apart.replicas, apart.tokens) == (together.ranks, together.replicas, together.tokens)
    # An average of all weights in fp32, of which each of two sends its half twice, over the node's network, once in 100 steps.
    network_gbps = 3200
    assert apart.step.parts["meetings"] == pytest.approx(4 * 8 * apart.parameters / (network_gbps * 1e9) / 100)
    seldom = planned({"every_steps": 1000, "launches": 2})
    assert seldom.step.parts["meetings"] == pytest.approx(apart.step.parts["meetings"] / 10)
    assert apart.step.parts["gradients and weights"] < together.step.parts["gradients and weights"]


def test_a_compiled_step_is_told_and_planned_and_the_same_run(
    told: Callable[..., Told], changed: Callable[..., Path]
) -> None:
    compiled, eager = told("dev", {"training.parallelism": {"compile": True}}), told("dev", {})
    assert compiled.read("train").parallelism.compile
    assert "parallelism" not in eager.pipeline.train
    assert compiled.pipeline.train_digest == eager.pipeline.train_digest
    steps = [
        plan(load(changed("prod", {"training.parallelism": {"compile": on}}))).training.step.value  # pyright: ignore[reportOptionalMemberAccess]
        for on in (True, False)
    ]
    assert steps[0] < steps[1]


def test_the_rest_of_the_trainers_keys_are_said_as_they_are(told: Callable[..., Told]) -> None:
    said: Json = {
        "document_mask": True,
        "local_sgd": {"every_steps": 20, "outer_lr": 0.5, "fragments": 2, "overlap_steps": 1},
        "recover": {"bad_step": "skip", "spike_factor": 3.0, "max_skips": 5, "hang_timeout_s": 60.0},
        "checkpoint": {"every_steps": 50, "keep": 2, "keep_every_steps": 100},
        "look_at_traffic_every_steps": 25,
        "sinks": ["tensorboard"],
        "model": SHAPE
        | {
            "family": "qwen3",
            "rope_scaling": {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_context": 64},
        },
    }
    train = told("dev", {f"training.{key}": value for key, value in said.items()}).read("train")
    for key, value in said.items():
        found = getattr(train, key)
        if isinstance(value, dict):
            assert {name: found.model_dump()[name] for name in value} == value
        else:
            assert (list(found) if isinstance(found, tuple) else found) == value


def test_what_decides_no_weight_makes_no_new_run(told: Callable[..., Told]) -> None:
    digest = told("dev", {}).pipeline.train_digest
    aside = {"training.recover": {"bad_step": "skip"}, "training.look_at_traffic_every_steps": 10}
    assert told("dev", aside).pipeline.train_digest == digest
    assert told("dev", {"training.document_mask": True}).pipeline.train_digest != digest


def test_the_trainer_is_told_what_was_planned(prod: Objects, local: Objects) -> None:
    for objects in (prod, local):
        config = objects.one("ConfigMap", objects.one("Job", "train")["metadata"]["name"])["data"]["train.yaml"]
        expected = TrainConfig.model_validate(yaml.safe_load(config)).plan
        planned = objects.rendered.outputs["plan"]["training"]
        assert expected.step_s == pytest.approx(planned["step"]["value"], rel=0.01)
        assert expected.memory_bytes is not None
        assert 0 < expected.memory_bytes <= planned["memory"]["value"] * 2**30 * 1.01
        assert expected.peak_flops_per_rank == (989e12 if objects is prod else None)


def test_keys_for_weights_and_biases_come_from_a_secret(rendered: Callable[..., Objects]) -> None:
    objects = rendered("dev", {"training.sinks": ["wandb"], "training.secret": "wandb"})
    assert container_of(objects, "train")["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert "train-reaches-object-store" in objects.names("NetworkPolicy")


@pytest.mark.parametrize(
    ("values", "key", "says"),
    [
        (
            {"training.data.source": {"kind": "jsonl", "path": "/x", "volume_claim": "c"}},
            "source.path",
            "no path inside",
        ),
        ({"training.data.source": {"kind": "text", "path": "file:///x"}}, "source.path", "without file://"),
        ({"training.data.task": {"kind": "chat"}}, "data.source", "python-stdlib has none; use jsonl"),
        ({"training.data.vocab_size": 100}, "vocab_size", "must be at least 257"),
        ({"training.lora": {"rank": 4}}, "training.lora", "name the package to tune"),
        ({"training.base": {"path": "s3://b/m"}}, "base.path", "copy it to a volume"),
        ({"training.optim.min_lr": 1.0}, "min_lr", "the cosine only falls"),
        ({"training.optim.warmup_steps": 40_001}, "optim.warmup_steps", "above steps 200"),
        ({"training.local_sgd": {"every_steps": 2, "fragments": 3}}, "fragments", "more than every_steps 2"),
        ({"training.recover": {"spike_factor": 0.5}}, "spike_factor", "must be above 1"),
        ({"training.evaluate.baselines": ["trigram"]}, "gate.must_beat", "unigram is not among evaluate.baselines"),
        ({"training.gate.min_accuracy": {"arc": 0.5}}, "min_accuracy.arc", "evaluate.tasks is empty"),
        (CHAT | {"training.gate": {"must_beat": "trigram"}}, "gate.must_beat", "set must_beat: null"),
        (
            CLASSES | {"training.gate": {"must_beat": None, "max_bits_per_byte": 2.0}},
            "max_bits_per_byte",
            "set min_accuracy",
        ),
        ({"training.sinks": ["wandb"]}, "training.secret", "WANDB_API_KEY"),
    ],
)
def test_what_the_trainer_would_refuse_is_refused_at_its_line(
    changed: Callable[..., Path], values: Json, key: str, says: str
) -> None:
    path = changed("dev", values)
    with pytest.raises(StackError) as refused:
        load(path)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    assert says in message
    assert key in message.split(": ")[1]


def test_a_package_without_a_known_shape_is_refused_with_what_is_missing(changed: Callable[..., Path]) -> None:
    for base, says in (
        ({"path": "m", "volume_claim": "models"}, "set shape to a model of the catalogue"),
        ({"path": "m", "volume_claim": "models", "shape": "lama3-8b"}, "did you mean 'llama3-8b'"),
        ({"path": "m", "volume_claim": "models", "shape": "gpt2"}, "the trainer tunes llama"),
    ):
        with pytest.raises(ValueError, match=says):
            plan(load(tuned(changed, {"training.base": base})))


def test_checkpoints_in_an_object_store_are_each_runs_own_and_decide_nothing(
    told: Callable[..., Told], rendered: Callable[..., Objects]
) -> None:
    values = {"training.checkpoint.url": "s3://runs/ours/"}
    here, there = told("prod", {}).pipeline, told("prod", values).pipeline
    assert there.train_digest == here.train_digest
    assert there.checkpoints == f"s3://runs/ours/{here.train_digest}"
    assert there.words_of(0)[-1] == f"checkpoints={there.checkpoints}"
    assert there.words_of(2)[1:] == (f"run={there.run}-2", f"checkpoints={there.checkpoints}-2")
    objects = rendered("prod", values)
    assert objects.one("ServiceAccount", "train")["metadata"]["annotations"]
    assert "train-reaches-object-store" in objects.names("NetworkPolicy")


# What the trainer takes and a stack says in another way, or cannot say: a layout by its own names, and what `infra` fills in.
ELSEWHERE = {"parallelism", "plan"}


def test_a_stack_can_say_every_key_that_the_trainer_has() -> None:
    pairs = [(TrainConfig, Training), (EvaluateConfig, Evaluate), (GateConfig, Gate), (DataConfig, Data)]
    for theirs, ours in pairs:
        assert theirs.model_fields.keys() - ELSEWHERE <= ours.model_fields.keys()
    for theirs, ours in [(ModelConfig, ModelShape), (OptimConfig, Optim), (RecoverConfig, Recover)]:
        assert theirs.model_fields.keys() == ours.model_fields.keys()


@given(
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 4]),
    cp=st.sampled_from([1, 2]),
    fsdp=st.sampled_from([1, 2]),
    heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([1, 2, 4]),
    seq=st.sampled_from([6, 8, 16]),
    global_batch=st.sampled_from([16, 32]),
    document_mask=st.booleans(),
    local_sgd=st.sampled_from([None, {"every_steps": 2}]),
)
@settings(deadline=None)
def test_a_layout_is_refused_where_the_trainer_would_and_nowhere_else(
    tp: int, pp: int, cp: int, fsdp: int, heads: int, kv_heads: int, seq: int, global_batch: int, **more: Any
) -> None:
    model = SHAPE | {"heads": heads, "kv_heads": kv_heads, "layers": 4, "hidden": 64}
    common = {"seq": seq, "global_batch": global_batch, "micro_batch": 2, "steps": 1, **more}
    optim = {"lr": 1e-3, "min_lr": 0, "warmup_steps": 0}
    layout = Layout(dp=2, tp=tp, pp=pp, cp=cp, fsdp=fsdp)
    source = {"source": {"kind": "python-stdlib"}, "vocab_size": 512}
    training = Training.model_validate(
        common | {"name": "m", "pool": "p", "data": source, "model": model, "optim": optim}
    )
    parallelism = {"tp": tp, "pp": pp, "cp": cp, "dp_shard": fsdp}
    theirs = TrainConfig.model_validate(common | {"model": model, "optim": optim, "parallelism": parallelism})
    try:
        layout_of(theirs, world=layout.gpus)
        fit_dataset(theirs, vocab_size=512)
        refused = False
    except TrainerRefused:
        refused = True
    divides = global_batch % (2 * layout.batch_ranks) == 0  # SLW301 says so otherwise
    if divides:
        assert (obstacle(layout, training) is not None) == refused


def test_the_planner_knows_how_many_logits_the_trainer_holds() -> None:
    assert TRAINER.logits_at_once == LOGITS_AT_ONCE["cuda"]
