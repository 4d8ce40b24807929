"""What a run says of its cost is true: operations counted as the planner counts, waits, memory, goodput, traces, sinks."""

import gzip
import json
import os
import signal

import pytest
import torch
from programs_of_trainer import TRAIN
from torch.utils.flop_counter import FlopCounterMode

from infra.planner.shape import Shape
from trainer.config import ModelConfig, TrainConfig
from trainer.errors import Refused, StopSignal
from trainer.meter import flops_per_token, hardware_flops_per_token
from trainer.model import Decoder
from trainer.sinks import open_sinks
from trainer.train import train

SHAPE = ModelConfig(layers=3, hidden=32, heads=4, kv_heads=2, ffn=48, max_context=64)


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_operations_are_those_that_pytorch_counts():
    model = Decoder(SHAPE, vocab_size=100)
    tokens = torch.randint(0, 100, (2, 64))
    with FlopCounterMode(display=False) as counted:
        model(tokens, tokens).backward()
    # Its count of the backward pass of attention has the scores a second time: flash attention makes them again.
    again = 2 * SHAPE.layers * SHAPE.heads * SHAPE.head_width * 64
    assert counted.get_total_flops() / tokens.numel() == pytest.approx(
        flops_per_token(SHAPE, outputs=100, seq=64) + again, rel=1e-6
    )
    full = hardware_flops_per_token(SHAPE, outputs=100, seq=64, recompute="full")
    assert full == flops_per_token(SHAPE, outputs=100, seq=64) * 4 // 3


def test_operations_are_those_that_the_planner_counts():
    shape = Shape(
        layers=SHAPE.layers,
        hidden=SHAPE.hidden,
        heads=SHAPE.heads,
        kv_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_width,
        ffn=SHAPE.ffn,
        vocab=100,
        gated=True,
        tied=True,
    )
    assert flops_per_token(SHAPE, outputs=100, seq=64) == shape.flops_per_token(seq=64)


@pytest.fixture(scope="module")
def seen(dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("seen")
    plan = {"peak_flops_per_rank": 1e12, "step_s": 1e-6, "memory_bytes": 1 << 20}
    config = TrainConfig.model_validate({**TRAIN, "plan": plan, "sinks": ["tensorboard"]})

    def ask(step: int, _ranks) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.getsignal(signal.SIGUSR1)
    train(config, data=dataset, run=run, stop=StopSignal(), on_step=ask)
    assert signal.getsignal(signal.SIGUSR1) == before
    return run


def test_a_row_says_what_its_steps_cost(seen):
    for row in rows(seen):
        assert 0 < row["useful_s"] == row["step_s"]  # one step a row
        assert 0 <= row["data_wait_ratio"] < 1
        assert 0 < row["goodput_ratio"] <= 1
        assert row["memory_peak_bytes"] > 1 << 27  # a process with torch in it
        assert row["memory_to_planned_ratio"] == row["memory_peak_bytes"] / (1 << 20)
        assert row["step_to_planned_ratio"] == pytest.approx(row["step_s"] / 1e-6)
        a_token = row["mfu_ratio"] * 1e12 / row["tokens_per_s_per_rank"]
        shape = ModelConfig.model_validate(TRAIN["model"])
        assert a_token == pytest.approx(flops_per_token(shape, outputs=300, seq=32))
        assert row["hfu_ratio"] == row["mfu_ratio"]


def test_the_plots_and_the_traces_are_there(seen):
    assert (seen / "cost.png").read_bytes().startswith(b"\x89PNG")
    (trace,) = (seen / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {"_BlockOperation", "aten::mm"} & {event.get("name") for event in events}  # by kernels, or without them
    assert any(event.get("name") == "[memory]" for event in events)


def test_tensorboard_reads_what_the_sink_wrote(seen):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(seen / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert events.Scalars("train/loss")[-1].value == pytest.approx(rows(seen)[-1]["loss"])


def test_a_sink_without_its_library_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(Refused, match=r"wandb is not installed \(sinks\). Install it"):
        open_sinks(("wandb",), tmp_path, {})
