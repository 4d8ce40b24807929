"""Attention's projections and SwiGLU in few operations, for a CPU without a compiler: there each is a pass over memory.

Matrices that multiply the same input are one product, forward and backward. The rows of those of queries and keys are
taken so that the two numbers that rotary positions turn together lie side by side: then they are one complex number, and
a single multiplication turns them all. Scores are sums over a head's width and do not know of its order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fusable(x: Tensor, *layers: nn.Module) -> bool:
    """Whether float32 on a CPU and whole, plain matrices are all there is: no compiler, autocast, bias, adapter or DTensor."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
    if not plain or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(type(e) is nn.Linear and e.bias is None and type(e.weight) is nn.Parameter for e in layers)


def turned_projections(
    x_BLD: Tensor, layers: tuple[nn.Linear, nn.Linear, nn.Linear], cos_LW: Tensor, sin_LW: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, L, W) and keys (B, K, L, W), turned, and values (B, K, L, W); the tables are of `rope_tables`.

    The width of queries and keys is in an order of its own, the same for both.
    """
    half = cos_LW.shape[-1] // 2
    turns_LP = torch.complex(cos_LW[:, :half], sin_LW[:, half:])
    return _TurnedProjections.apply(x_BLD, *(layer.weight for layer in layers), turns_LP)


def gated(x_BLD: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
    """silu(gate(x))·up(x), (B, L, F)."""
    return _Gated.apply(x_BLD, gate.weight, up.weight)


def _in_pairs(rows_ED: Tensor, width: int) -> Tensor:
    """Rows i and i + W/2 of each head, one after the other."""
    return rows_ED.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


def _in_halves(rows_ED: Tensor, width: int) -> Tensor:
    """Undoes `_in_pairs`."""
    return rows_ED.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def _complex(pairs_BLHW: Tensor) -> Tensor:
    """(B, L, H, W) as (B, L, H, W/2) complex numbers of the same memory."""
    return torch.view_as_complex(pairs_BLHW.unflatten(-1, (-1, 2)))


class _TurnedProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        width = 2 * turns.shape[-1]
        weight = torch.cat([_in_pairs(q, width), _in_pairs(k, width), v])
        sizes = [matrix.shape[0] // width for matrix in (q, k, v)]
        qkv_BLNW = F.linear(x, weight).unflatten(-1, (-1, width))
        qk_BLNW, v_BLKW = qkv_BLNW.split([sizes[0] + sizes[1], sizes[2]], 2)
        # Not in place: selective recomputation keeps the product and turns it again.
        turned_BLNW = torch.view_as_real(_complex(qk_BLNW) * turns.unsqueeze(1)).flatten(-2)
        ctx.save_for_backward(x, weight, turns)
        ctx.sizes = sizes
        q_BLHW, k_BLKW = turned_BLNW.split(sizes[:2], 2)
        return q_BLHW.transpose(1, 2), k_BLKW.transpose(1, 2), v_BLKW.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, turns = ctx.saved_tensors
        width, back = 2 * turns.shape[-1], turns.conj().resolve_conj().unsqueeze(1)
        grad_BLNW = x.new_empty(*x.shape[:2], sum(ctx.sizes), width)
        q_BLHW, k_BLKW, v_BLKW = grad_BLNW.split(ctx.sizes, 2)
        for turned, grad in zip((q_BLHW, k_BLKW), grads[:2], strict=True):
            torch.mul(_complex(grad.transpose(1, 2)), back, out=_complex(turned))
        v_BLKW.copy_(grads[2].transpose(1, 2))
        grad_x, grad_weight = _of_product(grad_BLNW.flatten(2), x, weight)
        q, k, v = grad_weight.split([size * width for size in ctx.sizes])
        return grad_x, _in_halves(q, width), _in_halves(k, width), v, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight = torch.cat([gate, up])
        both = F.linear(x, weight)
        g, u = both.chunk(2, -1)
        opened = F.silu(g)
        ctx.save_for_backward(x, weight, both, opened)
        return opened * u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, both, opened = ctx.saved_tensors
        grad_both = torch.empty_like(both)
        (g, u), (grad_g, grad_u) = both.chunk(2, -1), grad_both.chunk(2, -1)
        torch.mul(grad, opened, out=grad_u)
        torch.ops.aten.silu_backward.grad_input(grad * u, g, grad_input=grad_g)
        grad_x, grad_weight = _of_product(grad_both, x, weight)
        grad_gate, grad_up = grad_weight.chunk(2)
        return grad_x, grad_gate, grad_up


def _of_product(grad_BLE: Tensor, x_BLD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the input and of the matrix of x·Wᵀ."""
    grad_NE = grad_BLE.flatten(0, 1)
    return (grad_NE @ weight_ED).view_as(x_BLD), grad_NE.t() @ x_BLD.flatten(0, 1)
