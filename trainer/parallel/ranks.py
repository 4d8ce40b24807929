"""The ranks of one run: who they are on the mesh, and what they tell one another."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from trainer.layout import Layout
from trainer.parallel.shared import SharedMemory, share_memory
from trainer.parallel.start import store_of_this_start


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device
    layout: Layout | None = None
    mesh: DeviceMesh | None = None
    """(pp, dp_replicate, fsdp, tp), where fsdp is dp_shard x cp: what shares a sequence shares gradients too. None where
    every rank holds the whole model."""
    cp_mesh: DeviceMesh | None = None
    independent_replicas: bool = False
    """Gradients stay in their replica, for local SGD to average weights later."""
    launch: int = 0
    """Which of the layout's launches this world is."""
    memory: SharedMemory | None = None
    """Of ranks that hold the whole model and are all on one machine, without GPUs."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def _of(self, name: str) -> int:
        return self.mesh.get_local_rank(name) if self.mesh else 0

    @property
    def dp(self) -> int:
        """Ranks that draw different samples."""
        return self.layout.dp if self.layout else self.world

    @property
    def dp_rank(self) -> int:
        if self.layout is None:
            return self.rank
        before = self.launch * self.layout.dp // self.layout.launches
        if self.mesh is None:
            return before + self.rank
        return before + self.replica * self.layout.dp_shard + self._of("fsdp") // self.layout.cp

    @property
    def replicas(self) -> int:
        return self.layout.dp_replicate if self.layout else self.world

    @property
    def replica(self) -> int:
        return self._of("dp_replicate") if self.mesh else self.rank

    @property
    def averaged_over(self) -> int:
        """Ranks whose gradients the backward pass averages."""
        if self.layout is None:
            return self.world
        shared = self.layout.dp_shard * self.layout.cp
        return shared if self.independent_replicas else shared * self.layout.dp_replicate

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss is to be added up: tensor ranks have the same, and a pipeline's last rank alone has it."""
        return self.layout is None or (self._of("tp") == 0 and self._of("pp") == self.layout.pp - 1)

    @property
    def counts_targets(self) -> bool:
        """The same of its number of targets, which context ranks have in common too."""
        return self.counts_loss and (self.cp_mesh is None or self.cp_mesh.get_local_rank() == 0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Adds a tensor up over all ranks, in place."""
        if self.memory is not None and self.memory.takes(values):
            return self.memory.sum(values)
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: Any) -> Any:
        """Every rank gets the plain value that rank 0 has."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def join_ranks(layout: Layout, *, independent_replicas: bool = False, launch: int = 0, timeout_s: float) -> Ranks:
    """Joins the group that torchrun describes in the environment and takes a place in `layout`.

    Without torchrun it is a world of one. A collective that waits longer than `timeout_s` fails.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # Checkpoints are coordinated on the CPU, from a thread, while the GPU goes on: they need a back end of their own.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(rendezvous("env://", rank, world, timeout=timeout))
        store = store_of_this_start(store, rank=rank, world=world)
        device_id = device if cuda else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device_id)
    return place(layout, rank=rank, device=device, independent_replicas=independent_replicas, launch=launch)


def place(layout: Layout, *, rank: int, device: torch.device, independent_replicas: bool, launch: int = 0) -> Ranks:
    """This rank's place in a layout of the group that it is in."""
    if layout.replicated_only and not independent_replicas:
        alone = layout.world == 1 or device.type == "cuda"
        memory = None if alone else share_memory(rank=rank, world=layout.world)
        return Ranks(rank=rank, world=layout.world, device=device, layout=layout, launch=launch, memory=memory)
    shape = (layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    cp_mesh = None
    if layout.cp > 1:
        shape = (layout.pp * layout.dp, layout.cp, layout.tp)
        cp_mesh = init_device_mesh(device.type, shape, mesh_dim_names=("rest", "cp", "tp"))["cp"]
    return Ranks(
        rank=rank,
        world=layout.world,
        device=device,
        layout=layout,
        mesh=mesh,
        cp_mesh=cp_mesh,
        independent_replicas=independent_replicas,
        launch=launch,
    )
