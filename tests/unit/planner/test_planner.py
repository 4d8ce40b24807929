"""Estimates follow the formulas they name, and move the right way."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.catalog import gpus, instance, instances, models
from infra.planner import plan, to_json
from infra.planner.shape import Shape
from infra.planner.train_memory import memory
from infra.planner.training import run_of
from infra.spec import ModelShape, Training, load

ROOT = Path(__file__).parents[3]
PROD = load(ROOT / "stacks" / "Pulumi.prod.yaml")


@pytest.mark.parametrize(
    ("shape", "vocab_size", "expected"),
    [  # published parameter counts of Llama 3 8B, Llama 2 7B and Llama 3.2 1B (tied)
        (
            {
                "layers": 32,
                "hidden": 4096,
                "heads": 32,
                "kv_heads": 8,
                "ffn": 14336,
                "max_context": 8192,
                "tied_embeddings": False,
            },
            128256,
            8030261248,
        ),
        (
            {
                "layers": 32,
                "hidden": 4096,
                "heads": 32,
                "kv_heads": 32,
                "ffn": 11008,
                "max_context": 4096,
                "tied_embeddings": False,
            },
            32000,
            6738415616,
        ),
        (
            {
                "layers": 16,
                "hidden": 2048,
                "heads": 32,
                "kv_heads": 8,
                "ffn": 8192,
                "max_context": 8192,
                "tied_embeddings": True,
            },
            128256,
            1235814400,
        ),
    ],
)
def test_parameters_are_those_published(shape, vocab_size, expected) -> None:
    assert Shape.of(ModelShape(**shape), vocab_size=vocab_size).parameters == expected


def test_kv_bytes_of_llama3_8b() -> None:
    shape = ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, max_context=8192)
    assert Shape.of(shape, vocab_size=128256).kv_bytes_per_token(bytes_per_value=2) == 128 * 1024


def test_parts_add_up_and_every_stack_can_be_planned(stack_path: Path) -> None:
    planned = plan(load(stack_path))
    assert planned.training is not None
    for estimate in [planned.training.memory, *(s.memory for s in planned.services if s.memory)]:
        assert estimate.value == pytest.approx(sum(estimate.parts.values()))
        assert estimate.assumptions
    assert to_json(planned)["pools"]


def with_training(**changes: object) -> Training:
    assert PROD.training is not None
    return Training.model_validate(PROD.training.model_dump() | changes)


@given(micro=st.integers(1, 64), more=st.integers(1, 64))
def test_memory_grows_with_the_micro_batch(micro: int, more: int) -> None:
    small, large = (memory(run_of(with_training(micro_batch=n), ranks=16)).value for n in (micro, micro + more))
    assert small < large


@given(steps=st.integers(2_000, 10**6), more=st.integers(1, 10**6))  # from prod's warm-up on
def test_price_never_falls_with_more_tokens(steps: int, more: int) -> None:
    prices = [
        plan(PROD.model_copy(update={"training": with_training(steps=n)})).training.usd for n in (steps, steps + more)
    ]
    assert prices[0] < prices[1]


def test_unknown_instance_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'p5.49xlarge' does not exist; did you mean .*'p5.48xlarge'"):
        instance("p5.49xlarge")


def test_catalogue_is_whole() -> None:
    for machine in instances().values():
        assert machine.gpu is None or machine.gpu in gpus(), machine.name
        assert (machine.gpus > 0) == (machine.gpu is not None), machine.name
        assert machine.price is None or machine.price_date >= "2026", machine.name
        assert machine.allocatable_gib <= machine.memory_gib


def test_users_catalogue_adds_and_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infra.catalog import _tables

    file = tmp_path / "mine.toml"
    file.write_text(
        "[gpu.X1]\ntflops_bf16 = 1\nmemory_gb = 8\nmemory_gib = 7\nbandwidth_gbps = 10\nintra_gbps = 1\n"
        '[instance.box]\ncloud = "local"\ngpu = "X1"\ngpus = 2\ncpus = 8\nmemory_gib = 32\nnetwork_gbps = 10\nprice = 0.5\n'
    )
    monkeypatch.setenv("SLIPWAY_CATALOG", str(file))
    _tables.cache_clear()
    try:
        assert instance("box").gpus == 2
        assert "H100" in gpus()
    finally:
        _tables.cache_clear()


ROW = '[instance.box]\ncloud = "local"\ngpus = 0\ncpus = 8\nmemory_gib = 32\nnetwork_gbps = 10\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        ("[instance", "is no TOML"),
        ("[instance]\nbox = 3\n", r"must hold tables, as \[instance.NAME\]"),
        ("[instance.box]\ncloud = 'local'\n", r"\[instance.box\] of the catalogue has no right `gpus`"),
        (ROW + "colour = 'red'\n", "no right `colour`"),
        (ROW.replace("cpus = 8", "cpus = 0"), "no right `cpus`"),
        (ROW.replace("memory_gib = 32", "memory_gib = nan"), "no right `memory_gib`"),
        (ROW.replace('"local"', "5"), "no right `cloud`"),
    ],
)
def test_a_users_catalogue_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, says: str
) -> None:
    from infra.catalog import _tables

    file = tmp_path / "mine.toml"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("SLIPWAY_CATALOG", str(file))
    _tables.cache_clear()
    try:
        with pytest.raises(ValueError, match=says):
            instances()
    finally:
        _tables.cache_clear()


def test_a_config_json_is_read_in_the_names_of_its_family() -> None:
    gpt2 = Shape.from_config({"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257})
    assert (gpt2.ffn, gpt2.gated, gpt2.tied) == (3072, False, True)
    assert gpt2.parameters == pytest.approx(124.4e6, rel=0.01)


TINY: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 9}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_size": 64}, "no `num_attention_heads`"),
        (
            {
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "vocab_size": 9,
                "num_local_experts": 8,
            },
            "tok",
        ),
        (
            TINY | {"hidden_size": "x"},
            "`hidden_size` of config.json must be a whole number from 1 to 16777216, and it is 'x'",
        ),
        (TINY | {"hidden_size": 0}, "and it is 0"),
        (TINY | {"num_attention_heads": -4}, "and it is -4"),
        (TINY | {"num_hidden_layers": float("nan")}, "and it is nan"),
        (TINY | {"vocab_size": 1e300}, "and it is 1e"),
        (TINY | {"num_attention_heads": 128}, "128 heads are more than hidden_size 64"),
        (TINY | {"kv_lora_rank": 4}, "no `qk_rope_head_dim`"),
        (TINY | {"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": 5}, "must be a list, and it is 5"),
    ],
)
def test_a_config_json_that_is_no_decoder_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Shape.from_config(config)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama3-70b", 70.6), ("qwen2.5-7b", 7.62), ("mistral-7b", 7.25), ("gpt3-175b", 175)]
)
def test_models_of_the_catalogue_have_their_published_size(name: str, billions: float) -> None:
    assert Shape.from_config(models()[name]).parameters / 1e9 == pytest.approx(billions, rel=0.005)
