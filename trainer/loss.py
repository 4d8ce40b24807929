"""Cross-entropy that never holds all of its logits when they would be large."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trainer.kernels import decoder as kernels

IGNORED = -100
"""A target that does not count: PyTorch's own number for it."""

LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Of a CPU as many as its caches hold; of a GPU 256 MiB in float32."""


def cross_entropy(head: nn.Linear, x_BLD: Tensor, targets_BL: Tensor, *, reduction: str) -> Tensor:
    """-ln p of the targets under `head(x)`, in nats: the `sum` over, or the `mean` of, the targets that count.

    The positions go through the head in pieces of LOGITS_AT_ONCE. Where the head is a plain matrix the gradients of a
    piece are made while its logits are at hand; otherwise the backward pass makes the logits again.
    """
    x_ND, targets_N = x_BLD.flatten(0, 1), targets_BL.flatten()
    rows = max(LOGITS_AT_ONCE[x_ND.device.type] // head.out_features, 1)
    if kernels.usable(x_ND, head):
        total = kernels.summed_loss(x_ND, head.weight, targets_N, at_once=rows)
    elif type(head) is nn.Linear and type(head.weight) is nn.Parameter and type(x_ND) is Tensor:
        total = _HeadAndLoss.apply(x_ND, head.weight, targets_N, rows)
    elif len(x_ND) <= rows:
        return summed_or_mean(head(x_ND), targets_N, reduction)
    else:
        pieces = zip(x_ND.split(rows), targets_N.split(rows), strict=True)
        sums = [checkpoint(_sum_of_piece, head, x, targets, use_reentrant=False) for x, targets in pieces]
        total = sum(sums[1:], start=sums[0])
    return total if reduction == "sum" else total / (targets_N != IGNORED).sum()


class _HeadAndLoss(torch.autograd.Function):
    """The sum, and with it the gradients, which the backward pass only scales: the logits are never kept nor made twice."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        total = x_ND.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x_ND) if wants_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        for start in range(0, len(x_ND), rows):
            x, targets = x_ND[start : start + rows], targets_N[start : start + rows]
            log_p = F.linear(x, weight_VD).float().log_softmax(-1)
            total += F.nll_loss(log_p, targets, ignore_index=IGNORED, reduction="sum")
            if not (wants_x or wants_weight):
                continue
            # d/d logits = p - 1 at the target; what does not count is taken out where a row is narrow.
            counts = (targets != IGNORED).unsqueeze(1)
            grad = log_p.exp_()
            grad.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), grad.new_full((len(x), 1), -1.0))
            grad = grad.to(weight_VD.dtype)
            if grad_x is not None:
                grad_x[start : start + rows] = (grad @ weight_VD) * counts
            if grad_weight is not None:
                grad_weight += grad.t() @ (x * counts)
        ctx.grads = grad_x, None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_x, grad_weight = (None if each is None else each * grad for each in ctx.grads)
        return grad_x, grad_weight, None, None


def _sum_of_piece(head: nn.Linear, x_ND: Tensor, targets_N: Tensor) -> Tensor:
    return summed_or_mean(head(x_ND), targets_N, "sum")


def summed_or_mean(logits_NV: Tensor, targets_N: Tensor, reduction: str) -> Tensor:
    """Cross-entropy in nats, computed in float32 whatever the dtype of the logits."""
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction=reduction)
