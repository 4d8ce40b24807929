"""The ranks of one run: who they are, how a model is laid over them, and what they tell one another.

Everything that knows of more than one process is here. One process is simply a world of one, without a group.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Adds a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: int) -> int:
        """Every rank gets the number that rank 0 has."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(box, src=0)
        return int(box.item())

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def join_ranks() -> Ranks:
    """Joins the group that torchrun describes in the environment; without torchrun, a world of one."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        device_id = device if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, device_id=device_id)
    return Ranks(rank=rank, world=world, device=device)


def parallelize(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Data parallel: every rank holds the model, and gradients are averaged while the backward pass still runs."""
    if ranks.world == 1:
        return model
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False)


def without_sync(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Gradients of a micro-batch stay on their rank unless it is the `last` of the step."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
