"""Ranks of one machine average their gradients in memory that they share, to the bit of what sockets give."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from layouts_of_trainer import VOCAB, config_of
from replicas_of_trainer import fork

import trainer.parallel.shared as shared
from tests.ports import free_port
from trainer.layout import layout_of
from trainer.parallel import Ranks, accumulate, join_ranks, lay_out
from trainer.parallel.step import MicroBatch

STEPS = 3


def on_two_ranks(act: Callable[[Ranks], None], directory: Path) -> list[str]:
    """What each rank said, once both have ended well."""
    port = free_port()

    def rank(number: int) -> None:
        torch.set_num_threads(1)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(number), "WORLD_SIZE": "2"}
        os.environ.update(meeting)
        ranks = join_ranks(layout_of(config_of({}), world=2), timeout_s=60)
        act(ranks)
        ranks.leave()

    said = [directory / f"said-{number}" for number in (0, 1)]
    pids = [fork(lambda number=number: rank(number), said=said[number]) for number in (0, 1)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0, 0], [each.read_text() for each in said]
    return [each.read_text() for each in said]


def gradients(ranks: Ranks) -> list[list[torch.Tensor]]:
    """Of some steps, with two micro-batches each of which every rank has its own."""
    laid, found = lay_out(config_of({}), vocab_size=VOCAB, ranks=ranks, low_precision=False), []
    for step in range(STEPS):
        draws = torch.Generator().manual_seed(2 * step + ranks.rank)
        rows = torch.randint(0, VOCAB, (4, 17), generator=draws)
        batches: list[MicroBatch] = [(some[:, :-1], some[:, 1:], None) for some in rows.split(2)]
        accumulate(laid.run, batches, ranks=ranks, autocast=nullcontext())
        found.append([parameter.grad.clone() for parameter in laid.module.parameters() if parameter.grad is not None])
        laid.module.zero_grad()
    return found


def test_gradients_are_those_of_sockets_to_the_bit(tmp_path, monkeypatch):
    def act(ranks: Ranks) -> None:
        through_memory = gradients(ranks)
        monkeypatch.setattr(shared, "MOST_BYTES", 0)
        through_sockets = gradients(ranks)
        for ours, theirs in zip(through_memory, through_sockets, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        print(torch.cat([each.flatten() for each in through_memory[-1]]).double().norm().item())

    first, second = on_two_ranks(act, tmp_path)
    assert first == second
    assert float(first) > 0


@pytest.mark.parametrize("hidden", [0, 1])
def test_a_rank_that_cannot_reach_the_memory_leaves_all_with_sockets(tmp_path, monkeypatch, hidden):
    """As on another machine, or behind another's namespace, where the path is nobody's or somebody else's."""

    def act(ranks: Ranks) -> None:
        if ranks.rank == hidden:
            monkeypatch.setattr(shared, "open", lambda *_: (tmp_path / "other").open("w+b"), raising=False)
        assert shared._memory_of_all(1024, ranks) is None
        assert ranks.sum(torch.ones(())).item() == 2

    on_two_ranks(act, tmp_path)


def test_a_kernel_that_gives_no_such_memory_leaves_all_with_sockets(tmp_path, monkeypatch):
    def refuse(_name: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    def act(ranks: Ranks) -> None:
        monkeypatch.setattr(os, "memfd_create", refuse)
        assert shared._memory_of_all(1024, ranks) is None

    on_two_ranks(act, tmp_path)
