"""Published measurements: the goals hold on points that no constant was derived from, and no point, however odd, is fatal."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from infra.cli.main import app
from infra.planner.accuracy import Accuracy, measure

HELD_OUT = json.loads((Path(__file__).parent / "heldout_points.json").read_text())
CALIBRATION = Path(__file__).parents[4] / "shared" / "data" / "estimator_points.json"
GOALS = {
    "training memory": (0.06, 0.15),
    "training throughput": (0.15, 0.35),
    "inference memory": (0.02, 0.10),
    "decode throughput": (0.12, 1.0),
    "all-reduce": (0.20, 1.0),
    "oom and fits": (0.0, 0.0),
}


def assert_goals(found: Accuracy, *, points: int) -> None:
    for kind, (middle, tail) in GOALS.items():
        assert found.categories[kind]["median"] <= middle, kind
        assert found.categories[kind]["p90"] <= tail, kind
    assert len(found.not_estimated) <= 0.05 * points, found.not_estimated
    wrong = [row for row in found.points if isinstance(row.measured, bool) and row.predicted != row.measured]
    assert not wrong


def test_goals_hold_on_other_sources() -> None:
    assert_goals(measure(HELD_OUT), points=len(HELD_OUT))


@pytest.mark.skipif(not CALIBRATION.is_file(), reason="the calibration points are not beside this checkout")
def test_goals_hold_on_the_calibration_points() -> None:
    points = json.loads(CALIBRATION.read_text())
    assert_goals(measure(points), points=len(points))


def test_document_has_the_published_form() -> None:
    document = measure([*HELD_OUT[:3], {"id": "none", "measured": {"mfu": 1}, "category": "train"}]).to_json()
    assert set(document["points"][0]) == {"id", "category", "quantity", "measured", "predicted", "rel_error"}
    assert set(document["categories"]["training memory"]) >= {"count", "median", "p90"}
    assert document["not_estimated"] == [
        {"id": "none", "why": "the shape is not known: no layers, hidden, heads, ffn, vocab"}
    ]
    json.dumps(document, allow_nan=False)


def point(**changes: object) -> dict[str, object]:
    return HELD_OUT[0] | changes


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gpu": "Cerebras WSE-3"}, "is not in the catalogue"),
        ({"seq": None}, "no sequence length"),
        ({"vocab": None}, "no vocab"),
        ({"num_experts": 8}, "active_experts"),
        ({"parallelism": {"fsdp": 8, "ep": 8}}, "does not divide 1 experts"),
        ({"parallelism": {"fsdp": 3}}, "makes 3 GPUs"),
        ({"recompute": "sometimes"}, "is not understood"),
        ({"method": "LoRA"}, "number of trained parameters"),
        ({"layers": "many"}, "many"),
        ({"micro_batch": 0.5}, "micro"),
        ({"seq": -8192}, "seq"),
        ({"gpus": 0}, "gpus"),
        ({"measured": {}}, "no `measured`"),
        ({"measured": {"tokens_per_s_per_gpu": float("nan")}}, "is no measurement"),
        ({"measured": {"tokens_per_s_per_gpu": 0}}, "is no measurement"),
        ({"measured": {"tokens_per_s_per_gpu": "fast"}}, "nothing under `measured`"),
        ({"measured": {"vibes": "good"}}, "nothing under `measured`"),
    ],
)
def test_what_cannot_be_estimated_is_listed_with_why(changes, why) -> None:
    found = measure([point(**changes)])
    assert not found.points
    assert why in found.not_estimated[0].why


@pytest.mark.parametrize(
    ("quantity", "same_as", "times"),
    [
        ("peak_memory_mib", "peak_reserved_gib", None),
        ("tokens_per_s", "tokens_per_s_per_gpu", 8),
        ("tokens_per_s_total", "tokens_per_s_per_gpu", 8),
        ("tok_s_per_gpu", "tokens_per_s_per_gpu", 1),
        ("throughput_tokens_per_second_per_gpu", "tokens_per_s_per_gpu", 1),
        ("tgs", "tokens_per_s_per_gpu", 1),
        ("samples_per_s", "tokens_per_s_per_gpu", 8 / 8192),
        ("elapsed_time_per_iteration_ms", "iteration_time_s", 1000),
        ("step_time_s", "iteration_time_s", 1),
        ("sec_per_step", "iteration_time_s", 1),
        ("seconds_per_iteration", "iteration_time_s", 1),
        ("mfu", "mfu_pct", 0.01),
        ("tflops_per_gpu", "model_tflops_per_gpu", 1),
        ("model_tflop_s_per_gpu", "model_tflops_per_gpu", 1),
    ],
)
def test_quantities_are_read_by_many_names(quantity, same_as, times) -> None:
    measured = {quantity: 0.4 if quantity == "mfu" else 5.0, same_as: 40.0}
    rows = {row.quantity: row.predicted for row in measure([point(measured=measured)]).points}
    if times:
        assert rows[quantity] == pytest.approx(rows[same_as] * times)
    else:
        assert rows[quantity] > 1000


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ({"parallelism": "FSDP"}, {"parallelism": {"fsdp": 8}}),
        ({"parallelism": "fsdp=4, tp 2"}, {"parallelism": {"fsdp": 4, "tp": 2}}),
        ({"parallelism": {"dp_shard": 4, "dp_replicate": 2}}, {"parallelism": {"fsdp": 4, "dp": 2}}),
        ({"parallelism": {"dp": 8, "zero": "stage3"}}, {"parallelism": {"fsdp": 8, "zero_stage": 3}}),
        ({"recompute": True}, {"recompute": "full"}),
        ({"recompute": "activation checkpointing on"}, {"recompute": "full"}),
        ({"recompute": "off"}, {"recompute": "none"}),
        ({"gpu": "8x NVIDIA H100 80GB HBM3 (2.4 TB/s, 500W)"}, {"gpu": "H100-SXM-80GB-HBM2e-500W (2.4TB/s)"}),
    ],
)
def test_fields_are_read_in_many_spellings(said, means) -> None:
    predicted = [[row.predicted for row in measure([point(**changes)]).points] for changes in (said, means)]
    assert predicted[0] == predicted[1]
    assert predicted[0]


def test_a_collective_is_read_by_any_name_of_its_size() -> None:
    measured = {"collective": "all-reduce", "size_bytes": 2**24, "time_us": 115}
    raw = {"id": "c", "category": "collective", "gpus": 8, "gpu": "H100-SXM-80GB", "measured": measured}
    assert measure([raw]).points[0].predicted == pytest.approx(129, abs=2)
    alone = raw | {"measured": {"collective": "all_reduce", "bytes": 2**24, "busbw_gb_s": 255}}
    assert measure([alone]).points[0].predicted == pytest.approx(2**24 * 1.75 / 129e-6 / 1e9, rel=0.02)
    assert "not known" in measure([raw | {"measured": measured | {"collective": "gossip"}}]).not_estimated[0].why


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just({}) | st.just([])


@settings(max_examples=150, deadline=None)
@given(
    which=st.sampled_from(range(0, len(HELD_OUT), 7)),
    key=st.sampled_from(sorted({key for raw in HELD_OUT for key in raw})),
    value=anything,
)
def test_no_point_is_fatal(which, key, value) -> None:
    found = measure([HELD_OUT[which] | {key: value}])
    json.dumps(found.to_json(), allow_nan=False)
    assert found.points or found.not_estimated


@settings(max_examples=60, deadline=None)
@given(quantity=st.sampled_from(["peak_reserved_gib", "mfu_pct", "oom", "iteration_time_s", "bytes"]), value=anything)
def test_no_measurement_is_fatal(quantity, value) -> None:
    json.dumps(measure([point(measured={quantity: value})]).to_json(), allow_nan=False)


@pytest.mark.parametrize("junk", [None, 3, "point", [], {}])
def test_what_is_no_point_is_listed(junk) -> None:
    assert measure([junk]).not_estimated


@pytest.mark.parametrize(
    ("optimizer", "bytes_saved"), [("AdamW 8-bit", 6), ("SGD", 8), ("SGD with momentum", 4), ("AdamW", 0)]
)
def test_state_follows_the_optimizer(optimizer, bytes_saved) -> None:
    measured = {"peak_allocated_gib": 50.0}
    adam, other = (
        measure([point(measured=measured, optimizer=name)]).points[0].predicted for name in (None, optimizer)
    )
    assert adam - other == pytest.approx(bytes_saved * 8_030_261_248 / 8 / 2**30, rel=1e-3)


def test_estimate_prints_the_document_and_refuses_what_is_no_file_of_points(tmp_path) -> None:
    file = tmp_path / "points.json"
    file.write_text(json.dumps(HELD_OUT[:2]))
    printed = CliRunner().invoke(app, ["estimate", str(file), "--json"])
    assert json.loads(printed.stdout)["points"][0]["id"] == "H001"
    for text, says in (("{", "not JSON"), ("3", "no list of points"), (None, "no such file")):
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        refused = CliRunner().invoke(app, ["estimate", str(file)])
        assert refused.exit_code != 0
        assert says in str(refused.exception)
