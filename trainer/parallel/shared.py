"""Sums over the ranks of one machine, through memory that they share.

gloo sends through sockets even to a neighbour, by threads that have to be woken: of a small model that takes as long as a
fifth of the computing. Here a rank lays its numbers down, all wait for one another, and each adds up what lies there. They
wait awake for as long as most waits last, and then look every millisecond whether somebody has gone. Two places in turns
make one meeting enough: who lays down again has met all others after they read.
"""

import mmap
import os
import select
from contextlib import suppress
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import RankGone
from trainer.kernels import meeting

MOST_BYTES = 64 << 20
"""Of all places together, of which only what is used takes memory."""
_LINE_BYTES = 64
_AWAKE_US = 20_000


class SharedMemory:
    """Of all ranks of a group; not for two threads at once. It has no name, and goes with the last process that has it."""

    def __init__(self, memory: mmap.mmap, *, rank: int, processes: list[int]) -> None:
        self._world, self._rank, self._turn = len(processes), rank, 0
        bytes_, turns_bytes = torch.frombuffer(memory, dtype=torch.uint8), self._world * _LINE_BYTES
        self._turns = bytes_[_LINE_BYTES:][:turns_bytes]
        self._places = bytes_[_LINE_BYTES + turns_bytes :].view(2, self._world, -1)
        self._gone = select.poll()
        for process in processes:
            self._gone.register(os.pidfd_open(process), select.POLLIN)  # which can be read once it has ended
        _OPEN[id(self)] = self

    @property
    def place_bytes(self) -> int:
        """Of all that is added up at once."""
        return self._places.shape[-1]

    def takes(self, values: Tensor) -> bool:
        plain = values.is_cpu and values.is_contiguous() and values.dtype in (torch.float32, torch.float64)
        return plain and values.nbytes <= self.place_bytes

    def sum(self, values: Tensor) -> Tensor:
        """Adds `values`, of any shape, up over all ranks in their order, in place. Raises RankGone."""
        torch.ops.memory.all_reduce(values, id(self))
        return values

    def add_up(self, values: Tensor) -> None:
        flat = values.view(-1)
        laid = self._places[self._turn % 2, :, : flat.nbytes].view(flat.dtype)
        laid[self._rank].copy_(flat)
        self._turn += 1
        awake_us = _AWAKE_US
        while not self._have_all_come(awake_us):
            awake_us = 0
            if self._gone.poll(1) and not self._have_all_come(0):
                raise RankGone(world=self._world)
        torch.sum(laid, 0, out=flat)

    def _have_all_come(self, wait_us: int) -> bool:
        return meeting.meet(self._turns, ranks=self._world, rank=self._rank, turn=self._turn, wait_us=wait_us)


_OPEN: WeakValueDictionary[int, SharedMemory] = WeakValueDictionary()
_LIBRARY = torch.library.Library("memory", "DEF")  # an operation: a profiler sees it like any collective
_LIBRARY.define("all_reduce(Tensor(a!) values, int memory) -> ()")
_LIBRARY.impl("all_reduce", lambda values, memory: _OPEN[memory].add_up(values), "CPU")


def share_memory(*, rank: int, world: int) -> SharedMemory | None:
    """Of the default group, whose ranks all call this; None for all where one is on another machine or has no kernels.

    The others find it by the first rank's number and know it by its token: on another machine, or behind another's
    namespace, that number is someone else's.
    """
    descriptor, token = -1, uuid4().bytes
    place_bytes = MOST_BYTES // (2 * world) // _LINE_BYTES * _LINE_BYTES
    all_bytes = _LINE_BYTES * (1 + world) + 2 * world * place_bytes
    if rank == 0:
        with suppress(OSError, AttributeError):  # where it is not allowed, or no Linux, nobody finds anything
            descriptor = os.memfd_create("sums")
            os.ftruncate(descriptor, all_bytes)
            os.pwrite(descriptor, token, 0)
    told: list[Any] = [None] * world
    dist.all_gather_object(told, (os.getpid(), f"/proc/{os.getpid()}/fd/{descriptor}", token))
    processes, (_, path, token) = [process for process, _, _ in told], told[0]
    memory = None
    with suppress(OSError, ValueError):
        with open(path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), all_bytes)
        if mapped[: len(token)] == token and meeting.usable():
            memory = SharedMemory(mapped, rank=rank, processes=processes)
    everywhere = torch.tensor(int(memory is not None))
    dist.all_reduce(everywhere)
    if descriptor >= 0:
        os.close(descriptor)
    return memory if everywhere.item() == world else None
