"""Whatever befalls a run, it ends with the bits of an undisturbed one, and only the steps since a checkpoint are done again."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from injected_trainer import launch_two
from programs_of_trainer import TRAIN
from replicas_of_trainer import two_ranks

from trainer.config import TrainConfig
from trainer.data import Cursor, Dataset
from trainer.errors import Failed, StopSignal
from trainer.model import Decoder
from trainer.train import train

FAULTS = [
    {"step": 5, "rank": 1, "do": "kill", "after": 4},
    {"step": 10, "rank": 0, "do": "hang", "after": 8},
    {"step": 14, "rank": 0, "do": "corrupt", "after": 12},
    {"step": 17, "rank": 1, "do": "fill_disk", "after": 16},
    {"step": 22, "rank": 1, "do": "cut_network", "after": 20},
]
CONFIG = {**TRAIN, "steps": 26, "recover": {"hang_timeout_s": 12.0}}


def ranks_of_two(dataset: Path, directory: Path, events: list[dict]) -> str:
    """What rank 0 said of a run with these faults, which ended well."""
    (directory / "marks").mkdir(parents=True)
    config, said = TrainConfig.model_validate(CONFIG), directory / "said"
    assert launch_two(said, config, dataset, directory / "run", directory / "marks", events) == 0, said.read_text()
    return said.read_text()


def losses(directory: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (directory / "run" / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.slow
def test_after_every_fault_the_run_ends_as_if_nothing_had_been(dataset, tmp_path):
    ranks_of_two(dataset, tmp_path / "undisturbed", [])
    said = ranks_of_two(dataset, tmp_path / "disturbed", FAULTS)
    assert len(list((tmp_path / "disturbed" / "marks").iterdir())) == len(FAULTS)
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "undisturbed")
    weights = [tmp_path / name / "run" / "model" / "model.safetensors" for name in ("disturbed", "undisturbed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    resumed = [event["step"] for event in events if event["event"] == "resumed"]
    # The checkpoint of step 12 was corrupted, and that of step 20 could not be written.
    assert resumed[:3] == [4, 8, 8]
    assert resumed[3] == 16
    assert any(event["event"] == "damaged_checkpoint" and event["step"] == 12 for event in events)
    hung = next(event for event in events if event["event"] == "hung")
    assert "rank-0000" in hung["message"]
    stacks = (tmp_path / "disturbed" / "run" / "stacks" / "rank-00000.txt").read_text()
    assert "in hang" in stacks


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint of `FEW` and not for two."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


FEW = {**TRAIN, "steps": 6, "checkpoint": {"every_steps": 2, "keep": 1}, "parallelism": {"dp_shard": 2}}


def sharded_run(dataset: Path, directory: Path, *, checkpoints: Path) -> list[int]:
    """The exit codes of two ranks that share the weights; what they say is in `directory/said`."""
    directory.mkdir(exist_ok=True)
    where = {"data": dataset, "run": directory / "run", "checkpoints": str(checkpoints)}
    return two_ranks(TrainConfig.model_validate(FEW), said=directory / "said", **where)


def test_a_full_disk_is_told_once_and_with_room_again_the_run_ends_with_the_same_bits(dataset, tmp_path, small_disk):
    assert sharded_run(dataset, tmp_path / "full", checkpoints=small_disk / "steps") == [1, 1]
    said = (tmp_path / "full" / "said").read_text()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "the checkpoint of step 4 could not be written: No space left on device" in errors[0]
    assert re.search(r"/disk/steps, where 0\.\d MiB are free\)\. Free some space there", errors[0])
    assert "Traceback" not in said
    assert [path.name for path in (small_disk / "steps").iterdir()] == ["step-00000002"]

    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    assert sharded_run(dataset, tmp_path / "full", checkpoints=small_disk / "steps") == [0, 0]
    assert sharded_run(dataset, tmp_path / "undisturbed", checkpoints=tmp_path / "steps") == [0, 0]
    assert losses(tmp_path / "full") == losses(tmp_path / "undisturbed")
    weights = [tmp_path / name / "run" / "model" / "model.safetensors" for name in ("full", "undisturbed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


class Poison:
    """A forward pass whose loss is `factor` times too high whenever it sees the first sample of a given batch."""

    def __init__(self, dataset: Path, *, batch: int, factor: float) -> None:
        config = TrainConfig.model_validate(TRAIN)
        cursor = Cursor.of(Dataset.open(dataset), seq=config.seq, global_batch=config.global_batch, seed=config.seed)
        self._poisoned = cursor.batch(batch, micro=0, micro_batch=1, rank=0, world=1).tokens_BL[0].tolist()
        self._factor, self.seen = factor, 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = Decoder.forward

        def poisoned(model, tokens, *more):
            loss = forward(model, tokens, *more)
            if tokens[0].tolist() != self._poisoned:
                return loss
            self.seen += 1
            return loss * self._factor

        monkeypatch.setattr(Decoder, "forward", poisoned)


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("factor", "recover"),
    [
        (float("nan"), {"bad_step": "skip"}),
        (30.0, {"bad_step": "skip", "spike_factor": 3.0}),
    ],
)
def test_a_bad_batch_is_left_out_and_the_run_goes_on_from_the_checkpoint_before(
    dataset, tmp_path, monkeypatch, capsys, factor, recover
):
    poison = Poison(dataset, batch=6, factor=factor)
    poison.install(monkeypatch)
    config = TrainConfig.model_validate({**TRAIN, "recover": recover})
    train(config, data=dataset, run=tmp_path, stop=StopSignal())
    assert poison.seen == 1
    assert steps_of(tmp_path) == list(range(1, 13))
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    back = next(event for event in told if event["event"] == "went_back")
    assert (back["step"], back["skipped"]) == (4, [6])
    newest = tmp_path / "checkpoints" / "step-00000012" / "manifest.json"
    assert json.loads(newest.read_text())["progress"]["skipped"] == [6]


def test_a_spike_stops_the_run_where_it_is_not_to_skip(dataset, tmp_path, monkeypatch):
    Poison(dataset, batch=6, factor=30.0).install(monkeypatch)
    config = TrainConfig.model_validate({**TRAIN, "recover": {"spike_factor": 3.0}})
    with pytest.raises(Failed, match=r"above the bearable .* at step 7; the step was not made"):
        train(config, data=dataset, run=tmp_path, stop=StopSignal())
    assert not (tmp_path / "model").exists()
