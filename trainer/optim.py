"""AdamW (Loshchilov and Hutter 2019) over two groups, and the learning rate of each step."""

import math

import torch
from torch import nn

from trainer.config import OptimConfig
from trainer.kernels import adamw as kernels


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Matrices decay; gains of norms do not: pulling them to zero would only work against what they learn."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


@torch.no_grad()
def step_by(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """A step with the gradients times `factor`, which may change them.

    AdamW's over plain parameters of a CPU is one pass of C++ from the second step on: torch makes the moments in its first.
    """
    groups = [[p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    begun = type(optimizer) is torch.optim.AdamW and all(parameter in optimizer.state for parameter in parameters)
    if not (begun and kernels.usable((*parameters, *gradients))):
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        optimizer.step()
        return
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        kernels.step(group, own, [optimizer.state[parameter] for parameter in own], factor)


def learning_rate(step: int, *, steps: int, config: OptimConfig) -> float:
    """Of step 0, 1, …, `steps` - 1: up in a line for `warmup_steps`, then down along half a cosine to `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    falling = max(steps - 1 - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min((step - config.warmup_steps) / falling, 1.0)))
    return config.min_lr + (config.lr - config.min_lr) * cosine
