"""AdamW (Loshchilov and Hutter 2019) over two groups, and the learning rate of each step."""

import math

import torch
from torch import nn

from trainer.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Matrices decay; gains of norms do not: pulling them to zero would only work against what they learn."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, *, steps: int, config: OptimConfig) -> float:
    """Of step 0, 1, …, `steps` - 1: up in a line for `warmup_steps`, then down along half a cosine to `min_lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    falling = max(steps - 1 - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min((step - config.warmup_steps) / falling, 1.0)))
    return config.min_lr + (config.lr - config.min_lr) * cosine
