"""Mixtures of experts and latent attention: all of them are in memory, a token pays for the ones that it goes through."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.catalog import gpus, models
from infra.planner.run import Layout, Run, check_layout
from infra.planner.serve_memory import FORMATS, weight_bytes
from infra.planner.serve_time import Server
from infra.planner.shape import Experts, Shape
from infra.planner.train_memory import memory
from infra.planner.train_time import step_time


def known(name: str) -> Shape:
    return Shape.from_config(models()[name])


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("mixtral-8x7b", 46.7, 12.9),
        ("mixtral-8x22b", 141, 39),
        ("qwen3-30b-a3b", 30.5, 3.3),
        ("qwen3-235b-a22b", 235, 22),
        ("deepseek-v2-lite", 15.7, 2.7),
        ("deepseek-v3", 671, 37),
    ],
)
def test_parameters_are_those_that_its_authors_published(name: str, billions: float, active: float) -> None:
    shape = known(name)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.025)


@pytest.mark.parametrize(("name", "billions", "active"), [("gpt-oss-20b", 20.9, 3.6), ("gpt-oss-120b", 116.8, 5.1)])
def test_gpt_oss_counts_no_input_embedding_as_active(name: str, billions: float, active: float) -> None:
    """Its model card leaves the embedding out of the active parameters."""
    shape = known(name)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert (shape.active_parameters - shape.embedding) / 1e9 == pytest.approx(active, rel=0.01)


def test_latent_attention_keeps_one_vector_a_layer_on_every_gpu() -> None:
    shape = known("deepseek-v3")
    assert shape.kv_bytes_per_token(bytes_per_value=2) == 61 * (512 + 64) * 2
    assert shape.kv_bytes_per_token(bytes_per_value=2, tp=8) == shape.kv_bytes_per_token(bytes_per_value=2)


def test_all_experts_are_in_memory_and_one_token_reads_few() -> None:
    shape, dense = known("mixtral-8x7b"), known("mistral-7b")
    form, gpu = FORMATS["bf16"], gpus()["H200"]
    assert weight_bytes(shape, form=form) == pytest.approx(2 * shape.parameters, rel=0.001)
    one, full = (Server(shape=shape, gpu=gpu, form=form).decode_s(batch=batch) for batch in (1, 64))
    assert Server(shape=dense, gpu=gpu, form=form).decode_s() < one < full
    assert one < full * 0.4  # 12.7 of 46.4 GB


@given(st.integers(1, 64), st.floats(1, 4096), st.floats(1, 4096))
def test_more_tokens_touch_no_fewer_experts(active: int, few: float, more: float) -> None:
    experts = Experts(count=64, active=active, ffn=128)
    low, high = sorted((few, more))
    assert active / 64 - 1e-9 <= experts.touched(tokens=low) <= experts.touched(tokens=high) <= 1


@pytest.mark.parametrize("zero", [1, 3])
def test_spreading_experts_takes_their_weights_apart_and_sends_tokens(zero: int) -> None:
    run = Run(
        shape=known("mixtral-8x7b"),
        seq=4096,
        micro_batch=1,
        micro_batches=4,
        layout=Layout(dp=8, zero=1) if zero == 1 else Layout(fsdp=8),
    )
    spread = replace(run, layout=replace(run.layout, ep=8))
    assert memory(spread).value < memory(run).value
    gpu = gpus()["H100"]
    assert step_time(spread, gpu=gpu).parts["tensor and context parallel"] > 0


def test_experts_of_one_that_take_all_tokens_are_a_dense_model() -> None:
    dense = known("llama3-8b")
    same = replace(dense, experts=Experts(count=1, active=1, ffn=dense.ffn))
    router = dense.layers * dense.hidden
    assert same.parameters == dense.parameters + router
    assert same.flops_per_token(seq=4096) == dense.flops_per_token(seq=4096) + 6 * router


@pytest.mark.parametrize(("ep", "says"), [(3, "does not divide 8 experts"), (8, "data-parallel ranks")])
def test_a_layout_that_experts_do_not_allow_is_refused(ep: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_layout(known("mixtral-8x7b"), Layout(fsdp=4, ep=ep))
    with pytest.raises(ValueError, match="does not divide 1 experts"):
        check_layout(known("llama3-8b"), Layout(fsdp=4, ep=2))


@pytest.mark.parametrize("changes", [{"num_experts_per_tok": 0}, {"num_experts_per_tok": 9}])
def test_half_a_mixture_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        Shape.from_config(models()["mixtral-8x7b"] | changes)
