"""Gradients of ranks on one machine, averaged in memory that they share.

Through sockets of the same machine a small model's gradients take longer than its optimizer step: every byte is copied by
two threads and twice by the kernel, in turns that each wait to be woken. Here a rank lays its gradients down, all wait for
one another, and each averages what lies there. They wait in a barrier of their group, which also tells of a rank that has
gone; two places in turns make one barrier enough, since who lays down again has met all others after they read.
"""

import mmap
import os
from contextlib import suppress
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from trainer.parallel.ranks import Ranks

MOST_BYTES = 64 << 20
"""Of all that is shared. Larger gradients are sent while the backward pass still runs, and are a smaller part of a step."""

_LIBRARY = torch.library.Library("memory", "DEF")
_LIBRARY.define("all_reduce(Tensor(a!) values, Tensor(b!) laid, int rank) -> ()")


def _all_reduce(values: Tensor, laid: Tensor, rank: int) -> None:
    """`values` (N) become the mean of those of all ranks, by way of `laid` (ranks, N)."""
    laid[rank].copy_(values)
    dist.barrier()
    torch.mean(laid, 0, out=values)


_LIBRARY.impl("all_reduce", _all_reduce, "CPU")  # an operation, so that a profiler sees it like any collective


def average_in_shared_memory(run: DistributedDataParallel, ranks: Ranks) -> bool:
    """Lets DDP do so where all ranks are on one machine and their gradients are few; returns whether it does."""
    trained = [parameter for parameter in run.parameters() if parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in trained)
    shared_bytes = 2 * ranks.world * numbers * 4
    plain = all(parameter.is_cpu and parameter.dtype == torch.float32 for parameter in trained)
    if not plain or not 0 < shared_bytes <= MOST_BYTES:
        return False
    memory = _memory_of_all(shared_bytes, ranks)
    if memory is None:
        return False
    places = torch.frombuffer(memory, dtype=torch.float32, offset=_TOKEN_BYTES).view(2, ranks.world, numbers)
    run.register_comm_hook(_Average(places, ranks.rank), _Average.average)
    return True


class _Average:
    def __init__(self, places: Tensor, rank: int) -> None:
        self._places, self._rank, self._turn = places, rank, 0

    def average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        values, self._turn = bucket.buffer(), 1 - self._turn
        torch.ops.memory.all_reduce(values, self._places[self._turn, :, : len(values)], self._rank)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(values)
        return done


_TOKEN_BYTES = 64


def _memory_of_all(count_bytes: int, ranks: Ranks) -> mmap.mmap | None:
    """Zeros that all ranks can write, behind _TOKEN_BYTES of their own; None for all where one is on another machine.

    It has no name and goes with the last process that has it, however that ends. The others find it by the first rank's
    number and know it by its token: on another machine, or behind another's namespace, that number is someone else's.
    """
    descriptor, token = -1, uuid4().bytes
    if ranks.first:
        with suppress(OSError, AttributeError):  # where it is not allowed, or no Linux, nobody finds anything
            descriptor = os.memfd_create("gradients")
            os.ftruncate(descriptor, _TOKEN_BYTES + count_bytes)
            os.pwrite(descriptor, token, 0)
    path, token = ranks.from_first((f"/proc/{os.getpid()}/fd/{descriptor}", token))
    try:
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), _TOKEN_BYTES + count_bytes)
        found = memory[: len(token)] == token
    except (OSError, ValueError):
        memory, found = None, False
    everywhere = ranks.sum(torch.tensor(int(found), device=ranks.device)).item() == ranks.world
    if descriptor >= 0:
        os.close(descriptor)
    return memory if everywhere else None
