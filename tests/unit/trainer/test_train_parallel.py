"""Every layout trains the same model: losses and gradients are those of one process, to rounding."""

from typing import Any

import pytest
from layouts_of_trainer import BASE, STEPS, run_layouts

ROUNDED, COARSE = 2e-5, 2e-2
"""Relative tolerances: float32 added up in another order, and bfloat16."""

TIED = {"model": {"tied_embeddings": True}}
DOCUMENTS = {"document_mask": True}
PADDED = {"test": {"padded": True}}
LOCAL = {"every_steps": 1, "outer_lr": 1.0, "outer_momentum": 0.0}
STREAMED = {"every_steps": 2, "outer_lr": 0.7, "outer_momentum": 0.6, "fragments": 2, "overlap_steps": 1}
PLAIN = {"optim": {"lr": 0.3, "grad_clip": 1e9}}


def split(**parallelism: Any) -> dict[str, Any]:
    return {"parallelism": parallelism}


LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    4: {
        "fsdp x tp, selective": {**split(dp_shard=2, tp=2, recompute="selective"), "test": {"save_at": 2}},
        "pp x fsdp bf16": {**split(pp=2, dp_shard=2), "dtype": "bfloat16"},
        "tied cp x fsdp, full": {**split(cp=2, dp_shard=2, recompute="full"), **TIED},
        "interleaved pp x cp": {**split(pp=2, cp=2, pp_schedule="interleaved")},
        "tied pp x fsdp": {**split(pp=2, dp_shard=2), **TIED, "test": {"save_at": 2}},
        "tied interleaved pp x tp": {**split(pp=2, tp=2, pp_schedule="interleaved"), **TIED},
        "hsdp bf16": {**split(dp_shard=2), "dtype": "bfloat16"},
        "padded pp x tp": {**split(pp=2, tp=2), **PADDED},
        "padded cp x fsdp": {**split(cp=2, dp_shard=2), **PADDED},
    },
    8: {
        "pp x fsdp x tp as saved by fsdp x tp": {
            **split(pp=2, dp_shard=2, tp=2),
            "test": {"load": "fsdp x tp, selective"},
        },
        "tied hsdp x tp as saved by tied pp x fsdp": {
            **split(dp_shard=2, tp=2),
            **TIED,
            "test": {"load": "tied pp x fsdp"},
        },
    },
    2: {
        "ddp": {"test": {"traffic": 3}},
        "fsdp": split(dp_shard=2),
        "tp": split(tp=2),
        "tied tp": {**split(tp=2), **TIED},
        "cp as saved by fsdp x tp": {**split(cp=2), "test": {"load": "fsdp x tp, selective"}},
        "pp as saved by fsdp x tp": {**split(pp=2), "test": {"load": "fsdp x tp, selective"}},
        "tied cp as saved by tied pp x fsdp": {**split(cp=2), **TIED, "test": {"load": "tied pp x fsdp"}},
        "documents, cp": {**split(cp=2), **DOCUMENTS},
        "documents, interleaved pp": {**split(pp=2, pp_schedule="interleaved"), **DOCUMENTS},
        "sgd ddp": {**PLAIN, "test": {"optimizer": "sgd"}},
        "sgd apart, every step": {**PLAIN, "local_sgd": LOCAL, "test": {"optimizer": "sgd"}},
        "streamed": {"local_sgd": STREAMED, "test": {"save_at": 3}},
        "streamed, gone on": {"local_sgd": STREAMED, "test": {"load": "streamed"}},
    },
    1: {
        "one": {},
        "tied one": TIED,
        "one bf16": {"dtype": "bfloat16"},
        "documents one": DOCUMENTS,
        "padded one": PADDED,
        "one as saved by fsdp x tp": {"test": {"load": "fsdp x tp, selective"}},
        "tied one as saved by tied pp x fsdp": {**TIED, "test": {"load": "tied pp x fsdp"}},
        "one, full recompute": split(recompute="full"),
        "one, large batch": {"micro_batch": 16},
    },
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """Of every layout the curve and the weights. Four ranks go first: the others load what they saved."""
    out = tmp_path_factory.mktemp("layouts")
    results: dict[str, Any] = {}
    for world, layouts in LAYOUTS.items():
        results |= run_layouts(world, out, layouts)
    return results


def assert_same(curve: list[list[float]], reference: list[list[float]], *, tolerance: float) -> None:
    for (loss, norm), (its_loss, its_norm) in zip(curve, reference[-len(curve) :], strict=True):
        assert loss == pytest.approx(its_loss, rel=tolerance)
        assert norm == pytest.approx(its_norm, rel=5 * tolerance)


def reference_of(name: str) -> str:
    return next(
        (f"{kind} one" for kind in ("tied", "documents", "padded") if kind in name),
        "one bf16" if "bf16" in name else "one",
    )


ALIKE = [name for layouts in LAYOUTS.values() for name in layouts if "sgd" not in name and "streamed" not in name]


@pytest.mark.parametrize("name", [name for name in ALIKE if not name.endswith("one") and name != "one bf16"])
def test_a_layout_gives_the_curve_of_one_process(found, name):
    reference = found[reference_of(name)]["curve"]
    curve = found[name]["curve"]
    assert len(curve) == (STEPS - 2 if "saved" in name else STEPS)
    assert_same(curve, reference, tolerance=COARSE if "bf16" in name else ROUNDED)


def test_the_curve_is_one_that_learns(found):
    losses = [loss for loss, _ in found["one"]["curve"]]
    assert losses[-1] < losses[0] / 2
    assert len(losses) == BASE["steps"]


def test_averaging_weights_at_every_step_is_data_parallel(found):
    """H = 1, SGD inside, an outer rate of 1 and no momentum."""
    apart, together = ([loss for loss, _ in found[name]["curve"]] for name in ("sgd apart, every step", "sgd ddp"))
    assert apart == pytest.approx(together, rel=ROUNDED)


def test_replicas_that_trained_apart_end_with_the_same_weights(found):
    first, second = found["streamed"]["weights"]
    assert first == second
    assert found["streamed"]["curve"][-1][0] < found["streamed"]["curve"][0][0] / 1.5


def test_streamed_replicas_go_on_from_a_checkpoint_with_a_fragment_on_its_way(found):
    assert found["streamed, gone on"]["curve"] == found["streamed"]["curve"][3:]
    assert found["streamed, gone on"]["weights"] == found["streamed"]["weights"]


def test_what_data_parallel_ranks_send_is_their_gradients_and_few_numbers_more(found):
    reduced = found["ddp"]["traffic"]["all_reduce"]
    gradient_bytes = 4 * found["ddp"]["parameters"]
    assert gradient_bytes < reduced["bytes"] < gradient_bytes + 100
    assert reduced["calls"] >= 2
    assert reduced["seconds"] > 0
