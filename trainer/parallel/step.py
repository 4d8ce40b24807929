"""Forward and backward over the micro-batches of a step, and what is done with the gradients, in any layout."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

from trainer.kernels import adamw as kernels
from trainer.parallel.context import own_positions
from trainer.parallel.pipeline import Pipeline
from trainer.parallel.ranks import Ranks

MicroBatch = tuple[Tensor, Tensor, Tensor | None]
"""Tokens, targets and, where attention has to know them, documents; each (B, L)."""


def accumulate(
    model: nn.Module | Pipeline, batches: list[MicroBatch], *, ranks: Ranks, autocast: AbstractContextManager[Any]
) -> Tensor:
    """Adds the gradients of the summed loss over `batches` to the parameters; returns that sum, 0 where it is not known.

    The sum is over the targets of this rank; gradients are averaged over `ranks.averaged_over` ranks.
    """
    tensor_parallel = ranks.layout is not None and ranks.layout.tp > 1
    with loss_parallel() if tensor_parallel else nullcontext():
        if isinstance(model, Pipeline):
            tokens = torch.cat([_own(tokens, ranks) for tokens, _, _ in batches])
            targets = torch.cat([_own(targets, ranks) for _, targets, _ in batches])
            masked = batches[0][2] is not None
            documents = torch.cat([rows for _, _, rows in batches if rows is not None]) if masked else None
            losses = [_plain(loss.detach()) for loss in model.step(tokens, targets, documents)]
            return torch.stack(losses).sum() if losses else torch.zeros((), device=ranks.device)
        total = torch.zeros((), device=ranks.device)
        for number, (tokens, targets, documents) in enumerate(batches, start=1):
            with _without_sync(model, last=number == len(batches)):
                with autocast:
                    loss = model(_own(tokens, ranks), _own(targets, ranks), documents, "sum")
                loss.backward()
            total += _plain(loss.detach())
        return total


def _own(rows_BL: Tensor, ranks: Ranks) -> Tensor:
    """The positions of each row that this rank computes, on its device."""
    rows_BL = rows_BL.to(ranks.device, non_blocking=True)
    if ranks.cp_mesh is None:
        return rows_BL
    own = own_positions(rows_BL.shape[1], rank=ranks.cp_mesh.get_local_rank(), cp=ranks.cp_mesh.size())
    return rows_BL[:, own.to(ranks.device)]


def _plain(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


class _FsdpWithoutSync:
    """FSDP2 has a switch where DDP has a context manager."""

    def __init__(self, model: FSDPModule) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._model.set_requires_gradient_sync(False)

    def __exit__(self, *_error: object) -> None:
        self._model.set_requires_gradient_sync(True)


def _without_sync(model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Gradients of a micro-batch stay on their rank unless it is the `last` of the step."""
    if last:
        return nullcontext()
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return _FsdpWithoutSync(model) if isinstance(model, FSDPModule) else nullcontext()


def gradient_norm(model: nn.Module | Pipeline, parameters: Iterable[Tensor], *, ranks: Ranks) -> Tensor:
    """The norm of all gradients of the model, wherever they are; a scalar on the device."""
    counted = [
        p.grad for p in parameters if p.grad is not None and not (isinstance(model, Pipeline) and model.is_copy(p))
    ]
    norm = kernels.norm(counted) if kernels.usable(counted) else _plain(nn.utils.get_total_norm(counted))
    if ranks.mesh is None or ranks.mesh["pp"].size() == 1:
        return norm
    squares = norm.square()
    dist.all_reduce(squares, group=ranks.mesh["pp"].get_group())
    return squares.sqrt()
