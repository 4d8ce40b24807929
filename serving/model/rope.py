"""Rotary positions: a pair of a head's values is turned by an angle that grows with the position (RoFormer, arXiv 2104.09864).

A model that was trained on for a longer context turns slower: every pair (`linear`, arXiv 2306.15595), or the less the more turns
it makes over the first context (`llama3`: Llama 3.1's release; `yarn`: arXiv 2309.00071, whose longer turns are also louder).
"""

import math

import torch
from torch import Tensor

from serving.model.config import ModelConfig, RopeScaling


def rope_table(config: ModelConfig, *, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each positions × 1 × D in float32, for the half-split rotation of Hugging Face's checkpoints.

    The first half of sin is negated, which turns `rotate_half(x) * sin` into `roll(x, D/2) * sin`.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq, loudness = 1.0 / config.rope_theta**exponent, 1.0
    if config.rope_scaling is not None:
        keep = _kept(inv_freq, config.rope_scaling, theta=config.rope_theta)
        inv_freq = keep * inv_freq + (1.0 - keep) * inv_freq / config.rope_scaling.factor
        loudness = config.rope_scaling.attention_factor
    angle = torch.outer(torch.arange(positions, dtype=torch.float32), inv_freq)
    cos, sin = angle.cos() * loudness, angle.sin() * loudness
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def _kept(inv_freq: Tensor, scaling: RopeScaling, *, theta: float) -> Tensor:
    """How much of each frequency stays as it is: 0 where it is slowed down by the whole factor, 1 where it is left alone."""
    if scaling.kind == "linear":
        return torch.zeros_like(inv_freq)
    if scaling.kind == "llama3":
        turns = scaling.original_max_positions * inv_freq / (2 * math.pi)
        return ((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)).clamp(0.0, 1.0)
    pairs = len(inv_freq)

    def pair_of(turns: float) -> float:
        """Which pair makes so many turns over the first context; they turn slower one after another."""
        return pairs * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.high_turns), pair_of(scaling.low_turns)
    if scaling.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    return 1.0 - ((torch.arange(pairs) - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
