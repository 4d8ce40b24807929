"""What a checkpoint holds: weights and moments by the names of the parameters, whatever layout they lie in."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader

from trainer.parallel.memory import plain_name
from trainer.parallel.ranks import Ranks

# PyTorch says so at every save and load of a run of one rank, which asks for it.
warnings.filterwarnings("ignore", "torch.distributed is disabled", module=r"torch\.distributed\.checkpoint")


def training_state(
    parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer, ranks: Ranks, **more: Any
) -> dict[str, Any]:
    """The state as it lies in memory: to be copied before it is saved, and loaded into in place.

    Replicas that train apart have each their own; `more` is saved beside.
    """
    prepare_moments(optimizer)
    weights, moments = {}, {}
    for part in parts:
        for name, parameter in part.named_parameters():
            plain = plain_name(name)
            weights[plain] = parameter.detach()
            moments |= {f"{plain}/{kind}": value for kind, value in optimizer.state.get(parameter, {}).items()}
    own = {"model": weights, "moments": moments, "random": torch.get_rng_state(), **more}
    return {f"replica-{ranks.replica}": own} if ranks.independent_replicas else own


def prepare_moments(optimizer: torch.optim.Optimizer) -> None:
    """Optimizers make their moments in the first step: this one has no gradient and no rate, and changes nothing."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if optimizer.state or not parameters:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def load_weights(weights: dict[str, Tensor], checkpoint: str, *, replica: int | None = None) -> None:
    """Fills whole tensors, by the names of parameters, from the checkpoint under a URL, whatever layout saved it."""
    state = {"model": weights} if replica is None else {f"replica-{replica}": {"model": weights}}
    state_dict_loader.load(state, storage_reader=FsspecReader(checkpoint), no_dist=True)
