"""A run ends with the same bits however often it was disturbed, and says clearly why when it cannot go on."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs_of_trainer import TRAIN, program_environment, run_program
from replicas_of_trainer import fork
from safetensors.torch import load_file

from trainer import alone, meeting
from trainer.config import TrainConfig
from trainer.errors import Failed, Interrupted, Refused, StopSignal
from trainer.errors import run_program as run_as_program
from trainer.launch import main as launcher
from trainer.model import Decoder
from trainer.optim import step_by
from trainer.storage import Storage
from trainer.train import train


def config_of(**more) -> TrainConfig:
    return TrainConfig.model_validate({**TRAIN, **more})


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(run)]


def same_weights(a: Path, b: Path) -> bool:
    one, other = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class StopAfter(StopSignal):
    """A signal that comes in the middle of the given step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._asked, self._step = 0, step

    @property
    def received(self):
        self._asked += 1
        return signal.SIGTERM if self._asked >= self._step else None

    @received.setter
    def received(self, value) -> None: ...


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("undisturbed")
    train(config_of(), data=dataset, run=run, stop=StopSignal())
    return run


def test_a_run_leaves_what_the_contract_says(undisturbed):
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "checkpoints",
        "cost.png",
        "log.jsonl",
        "loss.png",
        "model",
    ]
    names = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000008", "step-00000012"]
    provenance = json.loads((undisturbed / "model" / "slipway.json").read_text())
    assert provenance["steps"] == 12
    assert provenance["tokens"] == 12 * 4 * 32
    assert provenance["losses"]["final"] == rows(undisturbed)[-1]["loss"] < provenance["losses"]["first"]


@pytest.mark.parametrize("step", [1, 5, 8, 11])
def test_a_run_that_was_stopped_ends_with_the_same_bits(undisturbed, dataset, tmp_path, step):
    with pytest.raises(Interrupted, match=f"after step {step} of 12"):
        train(config_of(), data=dataset, run=tmp_path, stop=StopAfter(step))
    assert (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    assert not (tmp_path / "model").exists()
    train(config_of(), data=dataset, run=tmp_path, stop=StopSignal())
    assert losses(tmp_path) == losses(undisturbed)
    assert same_weights(tmp_path, undisturbed)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(undisturbed, dataset, tmp_path, capsys):
    with pytest.raises(Interrupted):
        train(config_of(), data=dataset, run=tmp_path, stop=StopAfter(9))
    part = next((tmp_path / "checkpoints" / "step-00000009").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-7] + b"damaged")
    capsys.readouterr()
    train(config_of(), data=dataset, run=tmp_path, stop=StopSignal())
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = next(event for event in events if event["event"] == "damaged_checkpoint")
    assert told["level"] == "warning"
    assert part.name in told["message"]
    assert next(event for event in events if event["event"] == "resumed")["step"] == 8
    assert losses(tmp_path) == losses(undisturbed)
    assert same_weights(tmp_path, undisturbed)


def test_a_finished_run_is_left_alone(undisturbed, dataset, capsys):
    before = (undisturbed / "model" / "model.safetensors").stat().st_mtime_ns
    train(config_of(), data=dataset, run=undisturbed, stop=StopSignal())
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (done["event"], done["skipped"]) == ("done", True)
    assert (undisturbed / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_checkpoints_of_another_config_are_refused_and_kept(undisturbed, dataset, tmp_path):
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(Refused, match="another config or dataset"):
        train(config_of(seed=5), data=dataset, run=tmp_path, stop=StopSignal())
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_accumulated_micro_batches_are_one_large_batch(undisturbed, dataset, tmp_path):
    train(config_of(micro_batch=4), data=dataset, run=tmp_path, stop=StopSignal())
    for (_, one), (_, other) in zip(losses(tmp_path), losses(undisturbed), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_step(dataset, tmp_path, monkeypatch):
    forward, calls, stepped = Decoder.forward, [0], [0]

    def spoiled(self, *arguments):
        calls[0] += 1
        return forward(self, *arguments) * (float("nan") if calls[0] > 2 * 5 else 1.0)  # two micro-batches a step

    monkeypatch.setattr(Decoder, "forward", spoiled)
    monkeypatch.setattr("trainer.step.step_by", lambda *given: (stepped.append(1), step_by(*given))[1])
    with pytest.raises(Failed, match=r"loss is nan .* at step 6; the step was not made"):
        train(config_of(), data=dataset, run=tmp_path, stop=StopSignal())
    assert sum(stepped) == 5
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_no_part_of_it(dataset, tmp_path, monkeypatch):
    def full(*_arguments, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Storage, "seal", full)
    with pytest.raises(Failed, match="step 4 could not be written: No space left on device"):
        train(config_of(), data=dataset, run=tmp_path, stop=StopSignal())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_run_whose_log_was_lost_is_finished_from_its_checkpoints(undisturbed, dataset, tmp_path):
    places = {"data": dataset, "run": tmp_path / "new", "checkpoints": str(tmp_path / "checkpoints")}
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    train(config_of(), **places, stop=StopSignal())
    assert same_weights(places["run"], undisturbed)
    assert json.loads((places["run"] / "model" / "slipway.json").read_text())["losses"] == {}


def test_a_run_that_another_process_trains_is_waited_for_and_left_alone(undisturbed, dataset, tmp_path, monkeypatch):
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(Interrupted, match="stopped while another process"):
        train(config_of(), data=dataset, run=tmp_path, stop=StopAfter(1))
    monkeypatch.setattr(alone, "PATIENCE_S", 0.0)
    with pytest.raises(Failed, match="another process is training this run"):
        train(config_of(), data=dataset, run=tmp_path, stop=StopSignal())
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    ending = threading.Timer(0.3, os.close, [other])
    ending.start()
    train(config_of(), data=dataset, run=tmp_path, stop=StopSignal())
    ending.join()
    assert same_weights(tmp_path, undisturbed)


def test_a_run_or_checkpoints_in_the_place_of_a_file_are_refused(dataset, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {"data": dataset, "run": tmp_path / "file"}
    with pytest.raises(SystemExit) as ended:
        run_as_program(lambda _words: train(config_of(), **places, stop=StopSignal()))
    assert ended.value.code == 2
    assert (
        f"({tmp_path / 'file'}). Name a place that exists and that this user can write to." in capsys.readouterr().err
    )
    with pytest.raises(Refused, match="checkpoints lie in a directory, and this is a file"):
        Storage(str(tmp_path / "file"))


def test_the_launcher_says_how_it_is_used(capsys):
    launcher(["--help"])
    assert "usage: python -m trainer.launch [torchrun's flags] -- --config FILE" in capsys.readouterr().out


def test_a_run_directory_that_cannot_be_made_is_refused_in_one_line(dataset, train_yaml, tmp_path):
    (tmp_path / "file").write_text("")
    ended = run_program("trainer", "--config", train_yaml, f"data={dataset}", f"run={tmp_path / 'file' / 'run'}")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: Not a directory")
    assert ended.stderr.count("\n") == 1


def test_the_launcher_refuses_before_any_rank_starts(dataset, train_yaml, tmp_path):
    arguments = ["--nproc-per-node=2", "--max-restarts=3", "--", "--config", train_yaml, f"data={dataset}"]
    ended = run_program("trainer.launch", "--standalone", *arguments, f"run={tmp_path / 'run'}", "optim.lrr=1")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "Did you mean 'lr'?" in ended.stderr
    ended = run_program("trainer.launch", "--standalone", *arguments, f"run={tmp_path / 'run'}", "global_batch=6")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "Set global_batch to 4 or 8" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--nproc-per-node=many"], "Unsupported nproc_per_node value: many"),
        (["--nnodes=x"], "invalid literal"),
        (["--max-restarts=x"], "invalid int value: 'x'"),
    ],
)
def test_flags_that_torchrun_does_not_take_are_refused_as_all_else(dataset, train_yaml, tmp_path, flags, said):
    with pytest.raises(Refused, match=rf"{said}.* \(torchrun's flags\)\. Usage: python -m trainer.launch"):
        launcher([*flags, "--", "--config", str(train_yaml), f"data={dataset}", f"run={tmp_path / 'run'}"])


@pytest.mark.parametrize(("port", "said"), [("x", "invalid int value: 'x'"), ("70000", "cannot listen: .*0-65535")])
def test_a_meeting_place_without_a_port_is_refused(port, said, monkeypatch):
    monkeypatch.setenv("MEETING_PORT", port)
    with pytest.raises(Refused, match=said):
        meeting.main([])


def test_what_ranks_meet_together_is_told_once_and_what_one_meets_alone_is_told_too(tmp_path, monkeypatch):
    """As torchrun starts them: each has a directory of its own in one of this start."""
    said = tmp_path / "said"

    def meet(rank: int) -> int:
        def main(_arguments: list[str]) -> None:
            if rank == 2:
                raise Refused("its shard is cut", where="rank 2", fix="Copy it again.")
            raise Failed("the disk is full", where="/runs", fix="Free some space.")

        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        return fork(lambda: end_with(main), said=said)

    def end_with(main: Callable[[list[str]], None]) -> None:
        try:
            run_as_program(main)
        except SystemExit as end:
            print("code", end.code)

    for pid in [meet(rank) for rank in (1, 2, 0)]:
        os.waitpid(pid, 0)
    lines = said.read_text().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert sorted(errors) == [
        "error: its shard is cut (rank 2). Copy it again.",
        "error: the disk is full (/runs). Free some space.",
    ]
    assert sorted(line for line in lines if line.startswith("code")) == ["code 1", "code 1", "code 2"]


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(two_ranks, dataset, tmp_path):
    short = config_of(**{key: value for key, value in LONG_RUN.items() if key != "checkpoint"})
    train(short, data=dataset, run=tmp_path, stop=StopSignal())
    for (_, one), (_, other) in zip(losses(two_ranks), losses(tmp_path), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


LONG_RUN = {"steps": 150, "checkpoint": {"every_steps": 20}}


def launch(dataset: Path, train_yaml: Path, run: Path) -> subprocess.Popen[str]:
    flags = ["--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    arguments = ["--config", str(train_yaml), f"data={dataset}", f"run={run}", "steps=150", "checkpoint.every_steps=20"]
    command = [sys.executable, "-m", "trainer.launch", *flags, "--", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=program_environment()
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    while not ((run / "log.jsonl").exists() and any(row[0] >= step for row in losses(run)[:])):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"trainer\0--config" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def two_ranks(dataset, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    import yaml

    (directory / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    process = launch(dataset, directory / "train.yaml", directory / "run")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return directory / "run"


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_the_run_ends_with_the_same_bits(two_ranks, dataset, train_yaml, tmp_path):
    process = launch(dataset, train_yaml, tmp_path / "run")
    wait_for_step(tmp_path / "run", 45, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert '"event": "resumed"' in out
    assert losses(tmp_path / "run") == losses(two_ranks)
    assert same_weights(tmp_path / "run", two_ranks)


@pytest.mark.slow
def test_sigterm_becomes_a_checkpoint_and_code_75_and_the_next_start_goes_on(two_ranks, dataset, train_yaml, tmp_path):
    process = launch(dataset, train_yaml, tmp_path / "run")
    wait_for_step(tmp_path / "run", 25, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    last = losses(tmp_path / "run")[-1][0]
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()
    process = launch(dataset, train_yaml, tmp_path / "run")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert losses(tmp_path / "run") == losses(two_ranks)
    assert same_weights(tmp_path / "run", two_ranks)
