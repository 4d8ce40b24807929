"""Ranks of one machine add up in memory that they share, to the bit of what sockets give."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import torch
from layouts_of_trainer import VOCAB, config_of
from replicas_of_trainer import fork

import trainer.parallel.shared as shared
from tests.ports import free_port
from trainer.errors import Failed
from trainer.kernels import meeting
from trainer.layout import layout_of
from trainer.parallel import Laid, Ranks, accumulate, join_ranks, lay_out
from trainer.parallel.step import MicroBatch

STEPS = 3
pytestmark = pytest.mark.skipif(not meeting.usable(), reason="no kernels can be compiled here")


def on_ranks(
    act: Callable[[Ranks], None], directory: Path, *, world: int = 2, ends: tuple[int, ...] = (0, 0)
) -> list[str]:
    """What each rank said, once all have ended as they should."""
    port = free_port()

    def rank(number: int) -> None:
        torch.set_num_threads(1)
        meeting_point = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update({**meeting_point, "RANK": str(number), "WORLD_SIZE": str(world)})
        ranks = join_ranks(layout_of(config_of({}), world=world), timeout_s=60)
        act(ranks)
        ranks.leave()

    said = [directory / f"said-{number}" for number in range(world)]
    pids = [fork(lambda number=number: rank(number), said=said[number]) for number in range(world)]
    codes = tuple(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    assert codes == ends, [each.read_text() for each in said]
    return [each.read_text() for each in said]


def laid_over(ranks: Ranks) -> Laid:
    return lay_out(config_of({}), vocab_size=VOCAB, ranks=ranks, low_precision=False)


def gradients(laid: Laid, ranks: Ranks) -> torch.Tensor:
    """Of some steps, with two micro-batches each of which every rank has its own."""
    found = []
    for step in range(STEPS):
        draws = torch.Generator().manual_seed(2 * step + ranks.rank)
        rows = torch.randint(0, VOCAB, (4, 17), generator=draws)
        batches: list[MicroBatch] = [(some[:, :-1], some[:, 1:], None) for some in rows.split(2)]
        accumulate(laid.run, batches, ranks=ranks, autocast=nullcontext())
        found.append(torch.cat([p.grad.flatten() for p in laid.module.parameters() if p.grad is not None]))
        laid.module.zero_grad()
    return torch.cat(found)


def test_gradients_are_those_of_sockets_to_the_bit(tmp_path):
    def act(ranks: Ranks) -> None:
        assert ranks.memory is not None
        through_memory = gradients(laid_over(ranks), ranks)
        remote = replace(ranks, memory=None)
        through_sockets = gradients(laid_over(remote), remote)
        assert torch.equal(through_memory, through_sockets)
        print(through_memory.double().norm().item())

    first, second = on_ranks(act, tmp_path)
    assert first == second
    assert float(first) > 0


def test_sums_of_many_ranks_that_come_early_and_late(tmp_path):
    """More ranks than cores, each late at its own times, with numbers of both kinds and of any size."""

    def act(ranks: Ranks) -> None:
        assert ranks.memory is not None
        draws = torch.Generator().manual_seed(ranks.rank)
        for turn in range(200):
            if turn % 50 == ranks.rank:
                time.sleep(0.03)
            values = torch.full(
                (1 + turn * 37 % 5000, 2), turn + ranks.rank, dtype=(torch.float32, torch.float64)[turn % 2]
            )
            values[0, 0] = torch.rand((), generator=draws)
            assert ranks.memory.takes(values)
            assert ranks.sum(values)[-1, -1].item() == 4 * turn + 6
            print(values[0, 0].item())

    said = on_ranks(act, tmp_path, world=4, ends=(0, 0, 0, 0))
    assert len(set(said)) == 1


def test_what_does_not_fit_goes_through_sockets(tmp_path, monkeypatch):
    def act(ranks: Ranks) -> None:
        monkeypatch.setattr(shared.SharedMemory, "add_up", lambda *_: pytest.fail("it does not fit"))
        large = torch.ones(shared.MOST_BYTES // 4 // 4 + 1)
        assert ranks.sum(large)[-1].item() == 2
        assert ranks.sum(torch.ones(4, dtype=torch.int64)).tolist() == [2] * 4

    on_ranks(act, tmp_path)


def test_who_waits_for_a_rank_that_was_killed_is_told(tmp_path):
    def act(ranks: Ranks) -> None:
        laid = laid_over(ranks)
        gradients(laid, ranks)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(Failed, match="another rank has gone"):
            gradients(laid, ranks)

    on_ranks(act, tmp_path, ends=(0, -signal.SIGKILL))


@pytest.mark.parametrize("hidden", [0, 1])
def test_a_rank_that_cannot_reach_the_memory_leaves_all_with_sockets(tmp_path, monkeypatch, hidden):
    """As on another machine, or behind another's namespace, where the path is nobody's or somebody else's."""

    def act(ranks: Ranks) -> None:
        assert ranks.memory is None
        assert ranks.sum(torch.ones(())).item() == 2

    def elsewhere(path: str, mode: str) -> IO[bytes]:
        return open(tmp_path / "other" if int(os.environ["RANK"]) == hidden else path, mode)

    (tmp_path / "other").touch()
    monkeypatch.setattr(shared, "open", elsewhere, raising=False)
    on_ranks(act, tmp_path)


def test_a_kernel_that_gives_no_such_memory_leaves_all_with_sockets(tmp_path, monkeypatch):
    def refuse(_name: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    def act(ranks: Ranks) -> None:
        assert ranks.memory is None
        assert ranks.sum(torch.ones(())).item() == 2

    monkeypatch.setattr(os, "memfd_create", refuse)
    on_ranks(act, tmp_path)
