"""Pipeline parallel: ranks share the layers, and micro-batches follow one another through them.

A stage is the decoder itself with what others hold taken out, so that its parameters keep their names. The schedules are
PyTorch's: 1F1B (Narayanan et al. 2019) and interleaved 1F1B (Narayanan et al. 2021). Tied embeddings are on the first stage
and on the last: both add up the gradients of both and make the same step (Shoeybi et al. 2019).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from trainer.config import ParallelConfig
from trainer.loss import summed_or_mean
from trainer.model import Decoder


class Elsewhere(nn.Module):
    """In the place of a module that another rank holds: what comes in goes out.

    The last stage's embeddings are elsewhere but for the weight, which is its head's under its own name.
    """

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, *_more: Any) -> Tensor:
        return x


def is_tied(decoder: Decoder) -> bool:
    """Whether the head's weight is the embeddings'; a classifier's head has its own."""
    return decoder.config.tied_embeddings and decoder.labels is None


def stages_of(config: ParallelConfig, *, pp_rank: int) -> list[int]:
    """The stages that a rank holds, in order: with v a rank, rank r has r, r + pp, r + 2·pp, …"""
    each = config.pp_stages_per_rank if config.pp_schedule == "interleaved" else 1
    return [pp_rank + config.pp * turn for turn in range(each)]


def keep_stage(decoder: Decoder, *, stage: int, stages: int) -> None:
    """Takes out of a whole decoder what is not this stage's. Layers are dealt evenly, the first stages having one more."""
    layers = torch.arange(decoder.config.layers).tensor_split(stages)[stage].tolist()
    for name in [name for name, _ in decoder.model.layers.named_children() if int(name) not in layers]:
        decoder.model.layers.register_module(name, Elsewhere())
    last = stage == stages - 1
    if stage > 0:
        shared = decoder.model.embed_tokens.weight if last and is_tied(decoder) else None
        decoder.model.embed_tokens = Elsewhere(shared)  # pyright: ignore[reportAttributeAccessIssue]
    if not last:
        decoder.model.norm = Elsewhere()  # pyright: ignore[reportAttributeAccessIssue]
        setattr(decoder, "lm_head" if decoder.labels is None else "score", Elsewhere())


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
        self._tied: Tensor | None = None
        self._ends: dist.ProcessGroup | None = None
        if is_tied(parts[0]) and (self._first or self._last):
            part = parts[0] if self._first else parts[-1]
            self._tied = part.model.embed_tokens.weight
            ranks = dist.get_process_group_ranks(group)
            ends = dist.new_group([ranks[0], ranks[-1]], use_local_synchronization=True)
            assert not isinstance(ends, int), "this rank is at an end"
            self._ends = ends
        if len(stages) == 1:
            self._schedule = Schedule1F1B(stages[0], micro_batches, loss_fn=_loss, scale_grads=False)
        else:
            self._schedule = ScheduleInterleaved1F1B(stages, micro_batches, loss_fn=_loss, scale_grads=False)

    def step(self, tokens_NL: Tensor, targets_NL: Tensor, documents_NL: Tensor | None) -> list[Tensor]:
        """Gradients are left on the parameters; returns the summed loss of each micro-batch on the last rank, else none."""
        losses: list[Tensor] = []
        inputs = (tokens_NL,) if self._first else ()
        more: dict[str, Any] = {"target": targets_NL, "losses": losses} if self._last else {}
        if documents_NL is not None:  # every stage has them from its own data
            more["documents_BL"] = documents_NL
        self._schedule.step(*inputs, return_outputs=False, **more)
        if self._tied is not None:
            self._add_up_tied_gradients(self._tied)
        return losses

    def _add_up_tied_gradients(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            # An embedding's gradient may be a sum that is still due, a head's lies as the weight does.
            parameter.grad = gradient = gradient.redistribute(placements=parameter.placements)
            gradient = gradient.to_local()
        dist.all_reduce(gradient, group=self._ends)

    def is_copy(self, parameter: Tensor) -> bool:
        """Whether another stage has the same parameter and counts its gradient."""
        return parameter is self._tied and not self._first


def _loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    return summed_or_mean(logits_BLV.flatten(0, 1), targets_BL.flatten(), "sum")
