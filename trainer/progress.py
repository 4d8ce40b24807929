"""How far a run is: its step, the batches it has left out, and the loss it is used to."""

from dataclasses import dataclass, field
from typing import Protocol

from trainer.data import Batch

_MEMORY = 0.98
"""The running mean of the loss looks back over some fifty steps."""


@dataclass
class Progress:
    step: int = 0
    skipped: list[int] = field(default_factory=list)
    """Numbers of batches, in order, that are never to be trained on."""
    loss_mean: float | None = None

    def advance(self, loss: float, *, step: int) -> None:
        """A step was made with that mean loss, and the run is at `step` now."""
        self.step = step
        self.loss_mean = loss if self.loss_mean is None else _MEMORY * self.loss_mean + (1 - _MEMORY) * loss

    def batch_of(self, step: int) -> int:
        """The number of the batch of a step: as the step, but for those that are left out."""
        number = step
        for left_out in self.skipped:
            number += left_out <= number
        return number


class Batches(Protocol):
    """Where the samples of a step come from."""

    def batch(self, step: int, *, micro: int, micro_batch: int, rank: int, world: int) -> Batch: ...


class Remaining:
    """The batches that a run has not left out, by the step that trains on them."""

    def __init__(self, batches: Batches, progress: Progress) -> None:
        self._batches, self._progress = batches, progress

    def batch(self, step: int, *, micro: int, micro_batch: int, rank: int, world: int) -> Batch:
        number = self._progress.batch_of(step)
        return self._batches.batch(number, micro=micro, micro_batch=micro_batch, rank=rank, world=world)
