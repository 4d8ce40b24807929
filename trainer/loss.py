"""Cross-entropy that never holds all of its logits when they would be large."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""A target that does not count: PyTorch's own number for it."""

LOGITS_AT_ONCE = 1 << 26
"""256 MiB of logits in float32; with their gradient, twice that."""


def cross_entropy(head: nn.Linear, x_BLD: Tensor, targets_BL: Tensor, *, reduction: str) -> Tensor:
    """-ln p of the targets under `head(x)`, in nats: the `sum` over, or the `mean` of, the targets that count.

    Above LOGITS_AT_ONCE the positions go through the head in pieces, and the backward pass makes the logits of a piece
    again instead of keeping them: one more product by the head in exchange for B·L·V numbers.
    """
    x_ND, targets_N = x_BLD.flatten(0, 1), targets_BL.flatten()
    pieces = max(-(-targets_N.numel() * head.out_features // LOGITS_AT_ONCE), 1)
    if pieces == 1:
        return summed_or_mean(head(x_ND), targets_N, reduction)
    sums = [
        checkpoint(_sum_of_piece, head, x, targets, use_reentrant=False)
        for x, targets in zip(x_ND.chunk(pieces), targets_N.chunk(pieces), strict=True)
    ]
    total = sum(sums[1:], start=sums[0])
    return total if reduction == "sum" else total / (targets_N != IGNORED).sum()


def _sum_of_piece(head: nn.Linear, x_ND: Tensor, targets_N: Tensor) -> Tensor:
    return summed_or_mean(head(x_ND), targets_N, "sum")


def summed_or_mean(logits_NV: Tensor, targets_N: Tensor, reduction: str) -> Tensor:
    """Cross-entropy in nats, computed in float32 whatever the dtype of the logits."""
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction=reduction)
