"""Pipeline parallel: ranks share the layers, and micro-batches follow one another through them.

A stage is the decoder itself with what others hold taken out, so that its parameters keep their names. The schedules are
PyTorch's: 1F1B (Narayanan et al. 2019) and interleaved 1F1B (Narayanan et al. 2021).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from trainer.config import ParallelConfig
from trainer.loss import summed_or_mean
from trainer.model import Decoder


class Elsewhere(nn.Module):
    """In the place of a module that another rank holds: what comes in goes out."""

    def forward(self, x: Tensor, *_tables: Tensor) -> Tensor:
        return x


def stages_of(config: ParallelConfig, *, pp_rank: int) -> list[int]:
    """The stages that a rank holds, in order: with v a rank, rank r has r, r + pp, r + 2·pp, …"""
    each = config.pp_stages_per_rank if config.pp_schedule == "interleaved" else 1
    return [pp_rank + config.pp * turn for turn in range(each)]


def keep_stage(decoder: Decoder, *, stage: int, stages: int) -> None:
    """Takes out of a whole decoder what is not this stage's. Layers are dealt evenly, the first stages having one more."""
    layers = torch.arange(decoder.config.layers).tensor_split(stages)[stage].tolist()
    for name in [name for name, _ in decoder.model.layers.named_children() if int(name) not in layers]:
        decoder.model.layers.register_module(name, Elsewhere())
    if stage > 0:
        decoder.model.embed_tokens = Elsewhere()  # pyright: ignore[reportAttributeAccessIssue]
    if stage < stages - 1:
        decoder.model.norm = Elsewhere()  # pyright: ignore[reportAttributeAccessIssue]
        decoder.lm_head = Elsewhere()  # pyright: ignore[reportAttributeAccessIssue]


class Pipeline:
    """The stages of this rank and the schedule that runs them; `step` is forward and backward of all micro-batches."""

    def __init__(
        self,
        parts: list[Decoder],
        *,
        config: ParallelConfig,
        mesh: DeviceMesh,
        device: torch.device,
        micro_batches: int,
    ) -> None:
        numbers, group = stages_of(config, pp_rank=mesh.get_local_rank()), mesh.get_group()
        total = config.pp * len(numbers)
        stages: list[Any] = [
            PipelineStage(part, number, total, device, group=group) for part, number in zip(parts, numbers, strict=True)
        ]
        self.parts = parts
        self._first, self._last = numbers[0] == 0, numbers[-1] == total - 1
        if len(stages) == 1:
            self._schedule = Schedule1F1B(stages[0], micro_batches, loss_fn=_loss, scale_grads=False)
        else:
            self._schedule = ScheduleInterleaved1F1B(stages, micro_batches, loss_fn=_loss, scale_grads=False)

    def parameters(self) -> Iterator[nn.Parameter]:
        for part in self.parts:
            yield from part.parameters()

    def step(self, tokens_NL: Tensor, targets_NL: Tensor) -> list[Tensor]:
        """Gradients are left on the parameters; returns the summed loss of each micro-batch on the last rank, else none."""
        losses: list[Tensor] = []
        inputs = (tokens_NL,) if self._first else ()
        more = {"target": targets_NL, "losses": losses} if self._last else {}
        self._schedule.step(*inputs, return_outputs=False, **more)
        return losses


def _loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    return summed_or_mean(logits_BLV.flatten(0, 1), targets_BL.flatten(), "sum")
