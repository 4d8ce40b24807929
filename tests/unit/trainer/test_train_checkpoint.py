"""A checkpoint is of the moment it was asked for, whole or absent, and the training does not wait for it."""

import threading

import pytest
import torch
from torch import nn

from trainer import checkpoint
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig
from trainer.errors import Failed, Refused
from trainer.log import Log
from trainer.parallel import Ranks
from trainer.progress import Progress

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))


def of(run, *, identity: str = "this", **config) -> Checkpoints:
    return Checkpoints(run, config=CheckpointConfig(**config), identity=identity, ranks=ALONE, log=Log(rank=1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_training_goes_on_while_it_is_written_and_what_is_written_is_from_before(model, tmp_path, monkeypatch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    checkpoints, describe, go_on = of(tmp_path), checkpoint.describe_files, threading.Event()
    monkeypatch.setattr(checkpoint, "describe_files", lambda *a, **more: (go_on.wait(30), describe(*a, **more))[1])
    step(model, optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    checkpoints.save(Progress(1), [model], optimizer)
    step(model, optimizer)
    checkpoints.poll()
    assert (checkpoints.saved_step, checkpoints.steps()) == (0, [])
    go_on.set()
    checkpoints.wait()
    assert (checkpoints.saved_step, checkpoints.steps()) == (1, [1])
    after = [parameter.detach().clone() for parameter in model.parameters()]

    progress = checkpoints.load_newest([model], optimizer)
    assert progress == Progress(1)
    assert all(map(torch.equal, model.parameters(), before))
    step(model, optimizer)
    assert all(map(torch.equal, model.parameters(), after))


def test_the_moments_of_a_fresh_optimizer_are_those_of_the_checkpoint(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        step(model, optimizer)
    checkpoints = of(tmp_path)
    checkpoints.save(Progress(3, skipped=[1], loss_mean=0.1 + 0.2), [model], optimizer)
    checkpoints.wait()
    other = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    assert of(tmp_path).load_newest([other], fresh) == Progress(3, skipped=[1], loss_mean=0.1 + 0.2)
    step(model, optimizer)
    step(other, fresh)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_the_newest_are_kept_and_those_of_round_steps(model, tmp_path):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoints = of(tmp_path, keep=2, keep_every_steps=3)
    for number in range(1, 9):
        checkpoints.save(Progress(number), [model], optimizer)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 6, 7, 8]
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert not [name for name in names if "partial" in name]


def test_one_that_could_not_be_written_is_told_by_the_next_and_leaves_nothing(model, tmp_path, monkeypatch):
    optimizer, checkpoints = torch.optim.SGD(model.parameters(), lr=0.1), of(tmp_path)
    checkpoints.save(Progress(1), [model], optimizer)
    checkpoints.wait()

    def full(*_arguments, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "put_in_place", full)
    checkpoints.save(Progress(2), [model], optimizer)
    with pytest.raises(Failed, match="step 2 could not be written: No space left on device"):
        checkpoints.save(Progress(3), [model], optimizer)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_another_model_is_refused_before_anything_is_loaded(model, tmp_path):
    optimizer, checkpoints = torch.optim.SGD(model.parameters(), lr=0.1), of(tmp_path)
    checkpoints.save(Progress(1), [model], optimizer)
    checkpoints.wait()
    with pytest.raises(Refused, match="another config or dataset"):
        of(tmp_path, identity="that").load_newest([model], optimizer)
