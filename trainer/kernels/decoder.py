"""A decoder's block, its norm, and its head with the loss, as operations of autograd that are each one call of C++.

Where every small operation reads and writes all of memory, as on a CPU without a compiler, they take half of a small
model's step, and attention far more than its share. `decoder.cpp` says how it is done there.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.kernels.build import Unavailable, library

_LANES, _WIDEST_HEAD = 16, 256
"""Rows of activations are whole vectors of any processor; a head's width is multiplied in one go."""


_GIVEN = ("before", "q", "k", "v", "o", "after", "gate", "up", "down", "cos", "sin")


class _Block(ctypes.Structure):
    """`Block` of decoder.cpp, whose comments say what is what."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("batch", "length", "hidden", "heads", "kv_heads", "width", "ffn")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("starts", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("before", "q", "k", "v", "o", "after", "gate", "up", "down")),
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "x_scale", "qkv", "attended", "sums", "middle", "middle_scale", "both")
        ),
    )


class _Gradients(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("x", "before", "qkv", "o", "after", "both", "down"))


@cache
def why_not() -> str | None:
    """Why there are no kernels here; None where there are."""
    try:
        library().head_and_loss.argtypes = [ctypes.c_long] * 4 + [ctypes.c_void_p] * 5
        library().head_and_loss.restype = ctypes.c_double
        library().norm_forward.argtypes = [ctypes.c_long] * 2 + [ctypes.c_float] + [ctypes.c_void_p] * 4
        library().norm_backward.argtypes = [ctypes.c_long] * 2 + [ctypes.c_void_p] * 6
        library().block_forward.argtypes = [ctypes.c_void_p] * 2
        library().block_backward.argtypes = [ctypes.c_void_p] * 3
    except Unavailable as error:
        return str(error)
    return None


def usable(x: Tensor, *layers: nn.Module) -> bool:
    """Whether float32 on a CPU and whole, plain matrices are all there is: no bias, adapter, DTensor, autocast or compiler,
    and nobody who means to see each operation, as selective recomputation does.
    """
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
    if not plain or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._len_torch_dispatch_stack() or not all(map(_is_plain, layers)):
        return False
    return why_not() is None


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or layer.bias is not None or type(layer.weight) is not nn.Parameter:
        return False
    whole = layer.weight.dtype == torch.float32 and layer.weight.is_contiguous()
    return whole and layer.in_features % _LANES == 0


def block(
    x_BLD: Tensor, weights: Sequence[Tensor], tables: tuple[Tensor, Tensor], first_BL: Tensor | None, *, eps: float
) -> Tensor:
    """A block of heads as wide as the tables of `rope_tables` and at most 256.

    `weights` are those of the norm before attention, of q, k, v and o, and of the norm after it, gate, up and down. Each
    position sees all from `first_BL` of it (int64; without it from 0) on to itself.
    """
    return _BlockOperation.apply(x_BLD, first_BL, eps, *weights, *tables)


def norm(x: Tensor, gain: Tensor, *, eps: float) -> Tensor:
    """RMSNorm of each row (…, D)."""
    return _NormOperation.apply(x, gain, eps)


def fits_norm(x: Tensor, gain: Tensor) -> bool:
    return usable(x) and type(gain) is nn.Parameter and gain.dtype == torch.float32 and len(gain) % _LANES == 0


def fits(head_width: int) -> bool:
    return head_width <= _WIDEST_HEAD


def summed_loss(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, at_once: int) -> Tensor:
    """The sum of -ln p of the targets that are not negative, in nats; of the logits `at_once` rows are made at a time."""
    return _HeadAndLoss.apply(x_ND, head_VD, targets_N, at_once)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _BlockOperation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor | None, eps: float, *given: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, named = x.contiguous(), dict(zip(_GIVEN, given, strict=True))
        (batch, length, hidden), width, ffn = x.shape, named["cos"].shape[-1], len(named["gate"])
        queries, keys = len(named["q"]), len(named["k"])
        ctx.sizes = {"batch": batch, "length": length, "hidden": hidden, "width": width, "ffn": ffn, "eps": eps}
        ctx.sizes |= {"heads": queries // width, "kv_heads": keys // width}
        tensors = {
            **named,
            "starts": first,
            "x": x,
            "x_scale": x.new_empty(batch, length),
            "qkv": x.new_empty(batch, length, queries + 2 * keys),
            "attended": x.new_empty(batch, length, queries),
            "sums": x.new_empty(batch, queries // width, length),
            "middle": torch.empty_like(x),
            "middle_scale": x.new_empty(batch, length),
            "both": x.new_empty(batch, length, 2 * ffn),
        }
        ctx.names = tuple(tensors)
        ctx.save_for_backward(*tensors.values())
        out = torch.empty_like(x)
        library().block_forward(_structure(ctx.sizes, tensors), out.data_ptr())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, tensors = grad.contiguous(), dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        hidden, into = ctx.sizes["hidden"], [len(tensors[name]) for name in ("q", "k", "v")]
        found: dict[str, Tensor | None] = {name: torch.empty_like(tensors[name]) for name in ("x", "before", "after")}
        found |= dict.fromkeys(("qkv", "o", "both", "down"))
        wanted = dict(zip(_GIVEN, ctx.needs_input_grad[3:], strict=True))
        if wanted["q"] or wanted["k"] or wanted["v"]:
            found["qkv"] = grad.new_empty(sum(into), hidden)
        if wanted["o"] or wanted["gate"] or wanted["up"] or wanted["down"]:
            found |= {name: torch.empty_like(tensors[name]) for name in ("o", "down")}
            found["both"] = grad.new_empty(2 * ctx.sizes["ffn"], hidden)
        to = ctypes.byref(_Gradients(**{name: _at(tensor) for name, tensor in found.items()}))
        library().block_backward(_structure(ctx.sizes, tensors), grad.data_ptr(), to)
        qkv = (None, None, None) if found["qkv"] is None else found["qkv"].split(into)
        gate_up = (None, None) if found["both"] is None else found["both"].chunk(2)
        of_weights = (found["before"], *qkv, found["o"], found["after"], *gate_up, found["down"])
        return found["x"], None, None, *of_weights, None, None


def _structure(sizes: dict[str, Any], tensors: dict[str, Tensor | None]) -> Any:
    return ctypes.byref(_Block(**sizes, **{name: _at(tensor) for name, tensor in tensors.items()}))


class _NormOperation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = x.contiguous()
        y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1])
        ctx.save_for_backward(x, gain, scale)
        library().norm_forward(scale.numel(), len(gain), eps, *map(_at, (x, gain, scale, y)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, (x, gain, scale) = grad.contiguous(), ctx.saved_tensors
        of_x, of_gain = torch.empty_like(x), torch.empty_like(gain)
        library().norm_backward(scale.numel(), len(gain), *map(_at, (grad, x, gain, scale, of_x, of_gain)))
        return of_x, of_gain, None


class _HeadAndLoss(torch.autograd.Function):
    """The gradients are made with the loss, while logits are at hand; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, at_once: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, targets, wanted = x.contiguous(), targets.contiguous(), ctx.needs_input_grad[:2]
        ctx.grads = [torch.empty_like(each) if want else None for each, want in zip((x, head), wanted, strict=True)]
        pointers = map(_at, (x, head, targets, *ctx.grads))
        return x.new_tensor(library().head_and_loss(*x.shape, len(head), at_once, *pointers))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(None if each is None else each * grad for each in ctx.grads), None, None
