"""Memory of training and serving: what sharding, recomputation and formats do to it, whatever the model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.planner.estimate import GIB
from infra.planner.run import MEGATRON, Kernels, Layout, Run, check_layout, micro_batches
from infra.planner.serve_memory import FORMATS, cache, format_of, weight_bytes
from infra.planner.shape import Shape
from infra.planner.train_memory import memory


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    heads = 2 ** draw(st.integers(2, 6))
    return Shape(
        layers=8 * draw(st.integers(1, 12)),
        hidden=heads * 64,
        heads=heads,
        kv_heads=heads // 2 ** draw(st.integers(0, 2)),
        head_dim=64,
        ffn=heads * 64 * draw(st.integers(2, 4)),
        vocab=draw(st.integers(1000, 200_000)),
        gated=draw(st.booleans()),
        tied=draw(st.booleans()),
    )


def a_run(shape: Shape, layout: Layout, **more: object) -> Run:
    return Run(shape=shape, seq=2048, micro_batch=2, micro_batches=8, layout=layout, **more)  # type: ignore[arg-type]


@given(shape=shapes(), size=st.sampled_from([2, 4, 8]), times=st.sampled_from([2, 4]))
@pytest.mark.parametrize("way", ["fsdp", "tp", "pp", "cp"])
def test_memory_never_grows_with_more_shards(way: str, shape: Shape, size: int, times: int) -> None:
    if way == "tp":
        size, times = 2, 2
    few, many = (
        memory(
            a_run(shape, Layout(**{way: n}), states=MEGATRON if way == "pp" else a_run(shape, Layout()).states)
        ).value
        for n in (size, size * times)
    )
    assert many <= few * (1 + 1e-9)


@given(shape=shapes(), shards=st.sampled_from([2, 8, 64]))
def test_each_stage_of_zero_keeps_no_more_state(shape: Shape, shards: int) -> None:
    def state(zero: int) -> float:
        run = a_run(shape, Layout(fsdp=shards, zero=zero))  # type: ignore[arg-type]
        return memory(run).parts["weights, gradients, optimizer"]

    assert state(3) <= state(2) <= state(1) <= state(0)


@given(shape=shapes())
def test_recomputing_more_keeps_less(shape: Shape) -> None:
    none, op, full = (a_run(shape, Layout(), recompute=how) for how in ("none", "matmul", "full"))
    kept = [memory(run).parts["activations"] for run in (none, op, full)]
    assert kept[0] >= kept[1] >= kept[2] > 0


@given(shape=shapes())
def test_a_chunked_loss_needs_no_more(shape: Shape) -> None:
    by_loss = [
        memory(a_run(shape, Layout(), kernels=Kernels(loss=loss))).value for loss in ("eager", "compiled", "chunked")
    ]
    assert by_loss == sorted(by_loss, reverse=True)


@given(shape=shapes())
def test_adapters_need_less_than_all_weights(shape: Shape) -> None:
    whole, adapted = a_run(shape, Layout()), a_run(shape, Layout(), trained=1_000_000)
    assert memory(adapted).value < memory(whole).value


def test_zero_3_is_16_bytes_over_the_shards() -> None:
    shape = Shape(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=128256)
    state = memory(a_run(shape, Layout(fsdp=64))).parts["weights, gradients, optimizer"]
    assert state == pytest.approx(16 * shape.parameters / 64 / GIB, rel=1e-3)


def test_parts_add_up() -> None:
    shape = Shape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
    for statistic in ("allocated", "reserved", "device"):
        estimate = memory(a_run(shape, Layout(fsdp=8)), statistic=statistic)
        assert sum(estimate.parts.values()) == pytest.approx(estimate.value)


@given(shape=shapes())
def test_narrower_weights_leave_a_larger_cache(shape: Shape) -> None:
    for formats in (
        ("fp32", "bf16", "int8"),
        ("fp32", "bf16", "fp8", "int4"),
    ):  # fp8 and int4 leave the head in 16 bits
        tokens = [cache(shape, form=FORMATS[name], device_gib=80).tokens for name in formats]
        assert tokens == sorted(tokens)


@given(shape=shapes(), tp=st.sampled_from([1, 2, 4]))
def test_weights_of_all_gpus_are_the_model(shape: Shape, tp: int) -> None:
    whole = weight_bytes(shape, form=FORMATS["bf16"])
    assert whole <= tp * weight_bytes(shape, form=FORMATS["bf16"], tp=tp) <= 1.1 * whole


SHAPE = Shape(layers=4, hidden=512, heads=12, kv_heads=4, head_dim=64, ffn=2048, vocab=1000)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (Layout(tp=5), "tp 5 does not divide 12 heads; the nearest that do are 4 and 6"),
        (Layout(pp=8), "pp 8 is above 4 layers; the most is 4"),
        (Layout(pp=2, vpp=4), "the most vpp is 2"),
        (Layout(dp=0), "dp 0 is below 1"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_the_nearest(layout: Layout, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_layout(SHAPE, layout)


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest() -> None:
    assert micro_batches(global_batch=64, micro_batch=4, ranks=8) == 2
    with pytest.raises(ValueError, match="the nearest are 64 and 96"):
        micro_batches(global_batch=65, micro_batch=4, ranks=8)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="known are fp32, bf16"):
        format_of("fp7")
