"""Replicas that train apart and average what they have learnt every few steps: DiLoCo (Douillard et al. 2023).

Each replica takes `every_steps` steps of its own optimizer from the same weights. How far it came, the weights before
minus the weights after, is the gradient of an outer Nesterov step, averaged over replicas: a five-hundredth of the
traffic at five hundred steps. Streaming (Douillard et al. 2025) parts the model into fragments that are sent at steps of
their own, and lets the training go on while one travels: what was learnt meanwhile is added to what arrives.
With one step, a rate of 1, no momentum and SGD inside, it is data parallel.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config import LocalSgdConfig
from trainer.parallel.memory import plain_name
from trainer.parallel.ranks import Ranks


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that its replica may share out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(parts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """What this rank trains of a model, by the names in the package."""
    named = {name: p for part in parts for name, p in part.named_parameters() if p.requires_grad}
    return {plain_name(name): parameter for name, parameter in named.items()}


class LocalSgd:
    """The outer optimizer over the `parameters` of this rank, by name; `group` has this rank's like in every replica."""

    def __init__(
        self, parameters: dict[str, Tensor], *, config: LocalSgdConfig, group: dist.ProcessGroup | None, replicas: int
    ) -> None:
        self._config, self._group, self._replicas = config, group, replicas
        self._names = [list(part) for part in _parted(list(parameters), config.fragments)]
        self._parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self._before = {name: parameter.clone() for name, parameter in self._parameters.items()}
        self._momentum = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        # Of a fragment that travels: the weights when it was sent, and, once it has arrived, the sum over replicas.
        self._when_sent = {name: parameter.clone() for name, parameter in self._parameters.items()}
        self._sums = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        self._sent_at = torch.full((config.fragments,), -1, dtype=torch.int64)
        self._travelling: dict[int, tuple[dist.Work, Tensor]] = {}

    @classmethod
    def of(cls, config: LocalSgdConfig | None, parts: Sequence[nn.Module], ranks: Ranks) -> "LocalSgd | None":
        """Over the replicas of this launch; None where they do not train apart."""
        if config is None:
            return None
        assert ranks.mesh is not None
        group = ranks.mesh["dp_replicate"].get_group()
        return cls(trained(parts), config=config, group=group, replicas=ranks.replicas)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs, as it lies in memory; a fragment that travels is awaited, not applied."""
        for fragment in list(self._travelling):
            self._await(fragment)
        kinds = {
            "before": self._before,
            "momentum": self._momentum,
            "when_sent": self._when_sent,
            "sum": self._sums,
        }
        named = {f"{name}/{kind}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}
        return {"outer": named, "outer_sent_at": self._sent_at}

    def join(self, step: int) -> int:
        """Before the first step of a start; returns the step to go on from."""
        return step

    def leave(self) -> None:
        """After the last."""

    def after_step(self, done: int) -> int:
        """Sends the fragments that are due when `done` steps are, and takes in those that are to have arrived.

        Returns the steps that this replica has done now.
        """
        for fragment in range(len(self._names)):
            if self._is_due(fragment, done):
                self._send(fragment, done)
            if 0 <= int(self._sent_at[fragment]) <= done - self._config.overlap_steps:
                self._take_in(fragment)
        return done

    def finish(self, done: int) -> int:
        """Takes in what travels and averages everything once more: all replicas end with the same weights."""
        for fragment in range(len(self._names)):
            if self._sent_at[fragment] >= 0:
                self._take_in(fragment)
            self._send(fragment, done)
            self._take_in(fragment)
        return done

    def _is_due(self, fragment: int, done: int) -> bool:
        offset = fragment * self._config.every_steps // len(self._names)
        return done > offset and (done - offset) % self._config.every_steps == 0

    def _send(self, fragment: int, done: int) -> None:
        bucket = self._how_far(fragment)
        work = dist.all_reduce(bucket, group=self._group, async_op=True)
        assert work is not None
        self._travelling[fragment] = (work, bucket)
        self._sent_at[fragment] = done

    def _how_far(self, fragment: int) -> Tensor:
        """From the weights before to those of now, flat; now is noted."""
        names = self._names[fragment]
        for name in names:
            local(self._when_sent[name]).copy_(local(self._parameters[name]))
        return torch.cat([(local(self._before[name]) - local(self._when_sent[name])).flatten() for name in names])

    def _await(self, fragment: int) -> None:
        work, bucket = self._travelling.pop(fragment)
        work.wait()
        self._note_sum(fragment, bucket)

    def _note_sum(self, fragment: int, bucket: Tensor) -> None:
        sums = [local(self._sums[name]) for name in self._names[fragment]]
        for total, part in zip(sums, bucket.split([total.numel() for total in sums]), strict=True):
            total.copy_(part.view_as(total))

    def _take_in(self, fragment: int) -> None:
        """One outer step of Nesterov's momentum (as torch.optim.SGD has it), and on from there with what was learnt since."""
        if fragment in self._travelling:
            self._await(fragment)
        rate, keep = self._config.outer_lr, self._config.outer_momentum
        for name in self._names[fragment]:
            tensors = (self._sums, self._momentum, self._before, self._parameters, self._when_sent)
            total, momentum, before, parameter, when_sent = (local(each[name]) for each in tensors)
            gradient = total / self._replicas
            momentum.mul_(keep).add_(gradient)
            before.sub_(gradient + keep * momentum, alpha=rate)
            parameter.copy_(before + (parameter - when_sent))
        self._sent_at[fragment] = -1


def _parted(names: list[str], fragments: int) -> list[list[str]]:
    """Of every `fragments` parameters each fragment has one: parts from all depths, the paper's strided pattern."""
    return [names[fragment::fragments] for fragment in range(fragments)]
