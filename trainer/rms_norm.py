"""RMSNorm (Zhang and Sennrich 2019): in plain operations for every device, and in few of them for a CPU.

Where each operation is a kernel that reads and writes all of memory, as without a compiler on a CPU, the norms of a
small model cost as much as its attention. There the backward pass is the fused one of LayerNorm, told that the mean is 0.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _FewKernels(torch.autograd.Function):
    """float32 on a CPU. With r = 1/rms(x) and x' = x·r: dx = r·(g·w - x'·mean(g·w·x')).

    LayerNorm's backward subtracts mean(g·w) too; r times it is added back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        wanted = [True, ctx.needs_input_grad[1], False]
        layer_norm = torch.ops.aten.native_layer_norm_backward
        grad_x, grad_weight, _ = layer_norm(grad, x, [width], torch.zeros_like(scale), scale, weight, None, wanted)
        return grad_x.add_((grad @ weight).unsqueeze(-1).mul_(scale).mul_(1 / width)), grad_weight, None


class RMSNorm(nn.Module):
    """Computed in float32 whatever the dtype of the input."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) to the same."""
        if self._plain_on_cpu(x):
            return _FewKernels.apply(x, self.weight, self.eps)
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)

    def _plain_on_cpu(self, x: Tensor) -> bool:
        """A compiler fuses better than we do, and what a tensor split over ranks needs, only the plain operations say."""
        plain = type(x) is Tensor and type(self.weight) is nn.Parameter and not torch.compiler.is_compiling()
        return plain and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
