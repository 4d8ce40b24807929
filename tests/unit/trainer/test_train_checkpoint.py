"""A checkpoint is of the moment it was asked for, whole or absent, wherever it lies, and the training does not wait for it."""

import threading
from pathlib import Path
from uuid import uuid4

import fsspec
import object_store  # noqa: F401  # bucket://
import pytest
import torch
from programs_of_trainer import TRAIN
from torch import nn

from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, TrainConfig
from trainer.errors import Failed, Interrupted, Refused, StopSignal
from trainer.log import Log
from trainer.parallel import Ranks
from trainer.progress import Progress
from trainer.storage import Storage
from trainer.train import train

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))


@pytest.fixture(params=["directory", "object store"])
def place(request, tmp_path) -> str:
    """A file system, which can rename, and a store that cannot."""
    return str(tmp_path / "checkpoints") if request.param == "directory" else f"bucket://{uuid4().hex}/checkpoints"


def of(place: str, *, identity: str = "this", log: Log | None = None, **config) -> Checkpoints:
    config = CheckpointConfig(**config)
    return Checkpoints(Storage(place), config=config, identity=identity, ranks=ALONE, log=log or Log(rank=1))


def names_in(place: str) -> list[str]:
    """Of all files, with their directories."""
    filesystem, root = fsspec.url_to_fs(place)
    return [path.removeprefix(root).lstrip("/") for path in filesystem.find(root)]


def damage(place: str, pattern: str) -> None:
    filesystem, root = fsspec.url_to_fs(place)
    path = next(path for path in filesystem.find(root) if pattern in path)
    filesystem.pipe_file(path, filesystem.cat_file(path)[:-7] + b"damaged")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_training_goes_on_while_it_is_written_and_what_is_written_is_from_before(model, place, monkeypatch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    checkpoints, seal, go_on = of(place), Storage.seal, threading.Event()
    monkeypatch.setattr(Storage, "seal", lambda *arguments: (go_on.wait(30), seal(*arguments))[1])
    step(model, optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    checkpoints.save(Progress(1), [model], optimizer)
    step(model, optimizer)
    checkpoints.poll()
    assert (checkpoints.saved_step, checkpoints.storage.steps()) == (0, [])
    go_on.set()
    checkpoints.wait()
    assert (checkpoints.saved_step, checkpoints.storage.steps()) == (1, [1])
    after = [parameter.detach().clone() for parameter in model.parameters()]

    progress = checkpoints.load_newest([model], optimizer)
    assert progress == Progress(1)
    assert all(map(torch.equal, model.parameters(), before))
    step(model, optimizer)
    assert all(map(torch.equal, model.parameters(), after))


def test_the_moments_of_a_fresh_optimizer_are_those_of_the_checkpoint(model, place):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        step(model, optimizer)
    checkpoints = of(place)
    checkpoints.save(Progress(3, skipped=[1], loss_mean=0.1 + 0.2), [model], optimizer)
    checkpoints.wait()
    other = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    assert of(place).load_newest([other], fresh) == Progress(3, skipped=[1], loss_mean=0.1 + 0.2)
    step(model, optimizer)
    step(other, fresh)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_the_newest_are_kept_and_those_of_round_steps(model, place):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoints = of(place, keep=2, keep_every_steps=3)
    for number in range(1, 9):
        checkpoints.save(Progress(number), [model], optimizer)
    checkpoints.wait()
    assert checkpoints.storage.steps() == [3, 6, 7, 8]
    assert {name.split("/")[0] for name in names_in(place)} == {f"step-{number:08d}" for number in (3, 6, 7, 8)}


def test_what_was_left_of_one_that_was_never_whole_goes_with_the_next(model, place):
    optimizer, checkpoints = torch.optim.SGD(model.parameters(), lr=0.1), of(place, keep=1)
    checkpoints.storage.begin(3)
    with checkpoints.storage.writer(3)._digested(f"{checkpoints.storage._beside(3)}/__0_0.distcp", "wb") as stream:
        stream.write(b"killed while it was written")
    assert names_in(place)
    checkpoints.save(Progress(4), [model], optimizer)
    checkpoints.wait()
    assert {name.split("/")[0] for name in names_in(place)} == {"step-00000004"}


def test_an_old_one_that_cannot_be_removed_stops_nothing(model, place, monkeypatch, capsys):
    optimizer, checkpoints = torch.optim.SGD(model.parameters(), lr=0.1), of(place, keep=1, log=Log())
    remove, refusals = Storage._remove, iter([OSError("denied")])

    def refuse_once(storage: Storage, path: str) -> None:
        if "00000001" in path and (error := next(refusals, None)):
            raise error
        remove(storage, path)

    checkpoints.save(Progress(1), [model], optimizer)
    checkpoints.wait()
    monkeypatch.setattr(Storage, "_remove", refuse_once)
    checkpoints.save(Progress(2), [model], optimizer)
    checkpoints.wait()
    assert "an old checkpoint could not be removed: denied" in capsys.readouterr().out
    assert checkpoints.storage.steps() == [1, 2]
    checkpoints.save(Progress(3), [model], optimizer)
    checkpoints.wait()
    assert checkpoints.storage.steps() == [3]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("the bucket has gone")])
def test_one_that_could_not_be_written_is_told_by_the_next_and_leaves_nothing(model, place, monkeypatch, error):
    optimizer, checkpoints = torch.optim.SGD(model.parameters(), lr=0.1), of(place)
    checkpoints.save(Progress(1), [model], optimizer)
    checkpoints.wait()

    def fail(*_arguments, **_more):
        raise error

    monkeypatch.setattr(Storage, "seal", fail)
    checkpoints.save(Progress(2), [model], optimizer)
    with pytest.raises(Failed, match=r"step 2 could not be written: (No space left on device|the bucket has gone)"):
        checkpoints.save(Progress(3), [model], optimizer)
    assert {name.split("/")[0] for name in names_in(place)} == {"step-00000001"}


def test_a_full_disk_is_told_as_that_and_with_the_room_there_is(model, tmp_path, monkeypatch):
    begin = Storage.begin

    def begin_on_a_full_one(storage, number):
        begin(storage, number)
        (Path(storage._beside(number)) / "__0_0.distcp").symlink_to("/dev/full")

    monkeypatch.setattr(Storage, "begin", begin_on_a_full_one)
    checkpoints = of(str(tmp_path))
    checkpoints.save(Progress(1), [nn.Linear(512, 512)], torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(Failed, match=r"written: No space left on device \(.*, where [\d.]+ MiB are free\)\. Free some"):
        checkpoints.wait()


def test_another_model_is_refused_before_anything_is_loaded(model, place):
    optimizer, checkpoints = torch.optim.SGD(model.parameters(), lr=0.1), of(place)
    checkpoints.save(Progress(1), [model], optimizer)
    checkpoints.wait()
    with pytest.raises(Refused, match="another config or dataset"):
        of(place, identity="that").load_newest([model], optimizer)


@pytest.mark.parametrize("part", [".distcp", ".metadata", "manifest.json"])
def test_whatever_is_damaged_the_one_before_is_taken(model, place, part, capsys):
    optimizer, checkpoints = torch.optim.SGD(model.parameters(), lr=0.1), of(place)
    for number in (1, 2):
        checkpoints.save(Progress(number), [model], optimizer)
        checkpoints.wait()
    damage(f"{place}/step-00000002", part)
    assert of(place, log=Log()).load_newest([model], optimizer) == Progress(1)
    told = capsys.readouterr().out
    assert '"damaged_checkpoint"' in told
    assert part in told


def test_what_was_never_sealed_is_no_checkpoint(model, place):
    optimizer, checkpoints = torch.optim.SGD(model.parameters(), lr=0.1), of(place)
    for number in (1, 2):
        checkpoints.save(Progress(number), [model], optimizer)
        checkpoints.wait()
    filesystem, root = fsspec.url_to_fs(place)
    filesystem.rm(f"{root}/step-00000002/manifest.json")
    assert of(place).load_newest([model], optimizer) == Progress(1)


def test_a_run_keeps_its_checkpoints_in_an_object_store_and_goes_on_from_there(dataset, tmp_path, monkeypatch):
    config, place = TrainConfig.model_validate(TRAIN), f"bucket://{uuid4().hex}/of-a-run"

    def ends_at(step: int, run: Path) -> str:
        stop = StopSignal()

        def tell(done: int, _ranks: Ranks) -> None:
            if done + 1 == step:
                stop.received = True  # pyright: ignore[reportAttributeAccessIssue]

        try:
            train(config, data=dataset, run=run, checkpoints=place, stop=stop, on_step=tell)
        except Interrupted:
            assert not (run / "model").exists()
        return (run / "log.jsonl").read_text()

    ends_at(7, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert Storage(place).steps() == [4, 7]
    ends_at(0, tmp_path)
    assert Storage(place).steps() == [7, 8, 12]
    losses = [line.split('"lr"')[0] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    train(config, data=dataset, run=tmp_path / "undisturbed", stop=StopSignal())
    undisturbed = (tmp_path / "undisturbed" / "log.jsonl").read_text().splitlines()
    assert losses == [line.split('"lr"')[0] for line in undisturbed]


def test_a_store_that_cannot_be_opened_is_refused():
    with pytest.raises(Refused, match="cannot open the store of checkpoints: Protocol not known"):
        Storage("nowhere://bucket/x")
