"""The compiled kernels as functions of tensors, and the forms in which they want weights. See linear.h, attention.h.

Shapes: M rows of a batch, N outputs, K inputs, C columns of a panel (two vectors), G inputs that share a scale.
"""

import ctypes
import mmap
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels.build import Unavailable, library
from serving.model.quantized import CODE_MAX, GROUP, quantize

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
HUGE_BYTES = 8 << 20  # from here on memory comes in huge pages: a weight is read from end to end at each step

n, p = ctypes.c_long, ctypes.c_void_p


class Weights(ctypes.Structure):
    """The structures are laid out as in linear.h and forward.cpp."""

    _fields_ = (("data", p), ("scales", p), ("bias", p), ("format", n), ("outputs", n), ("inputs", n))


class Layer(ctypes.Structure):
    _fields_ = (
        *((norm, p) for norm in ("attention_norm", "ffn_norm", "q_norm", "k_norm")),
        *((weight, Weights) for weight in ("qkv", "out", "gate_up", "down")),
        ("cache", p),
    )


class Shape(ctypes.Structure):
    _fields_ = (
        *((size, n) for size in ("layers", "hidden", "ffn", "heads", "kv_heads", "dim", "half_cache")),
        ("eps", ctypes.c_float),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("rows", n), ("cos", p), ("sin", p), ("items", p), ("num_items", n), ("tables", p), ("slots", p), ("threads", n),
    )  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A weight N × K as panels: `data` is panel × K × C (bfloat16: panel × K/2 × C × 2; int4: two values of K a byte).

    `scales` is panel × K/G × C in float32 for int8 and int4, where a value is its code times its group's scale.
    """

    data: Tensor
    scales: Tensor | None
    bias: Tensor | None
    form: str
    outputs: int
    inputs: int

    @cached_property
    def c(self) -> Weights:
        scales, bias = (None if t is None else t.data_ptr() for t in (self.scales, self.bias))
        return Weights(self.data.data_ptr(), scales, bias, FORMATS[self.form], self.outputs, self.inputs)


class Kernels:
    """Calls into the library. Every tensor is on the CPU; activations are float32 with contiguous rows."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        weights, layer, shape, step = map(ctypes.POINTER, (Weights, Layer, Shape, Step))
        lib.forward.argtypes = [shape, layer, step, p]
        lib.linear.argtypes = [weights, p, n, n, p, n]
        lib.rows_of.argtypes = [weights, p, n, p, n]
        lib.rms_norm.argtypes = [p, p, ctypes.c_float, n, n, p, n]
        lib.rotate.argtypes = [p, n, n, n, n, p, p, n]
        lib.silu_multiply.argtypes = [p, n, n, p, n]
        lib.attend.argtypes = [shape, layer, step, p, p, p, n, p]
        for function in (
            lib.forward, lib.linear, lib.rows_of, lib.rms_norm, lib.rotate, lib.silu_multiply, lib.attend,
        ):  # fmt: skip
            function.restype = None
        for function in (lib.panel_columns, lib.group_inputs, lib.block_tokens, lib.rounds_activations):
            function.argtypes, function.restype = [], n
        self.columns, self.block_tokens = lib.panel_columns(), lib.block_tokens()
        self.halves_are_exact = not lib.rounds_activations()
        assert lib.group_inputs() == GROUP

    def pack(self, weight_NK: Tensor, form: str, bias: Tensor | None = None) -> Packed:
        """The weight in one of `FORMATS`. K must be even, and a multiple of G for int8 and int4.

        A float32 one whose values are all bfloat16's, as most published ones are, is kept as these where the products
        are computed in float32 all the same: half the memory, and the same result to the bit.
        """
        if form == "float32" and self.halves_are_exact and _is_bfloat16(weight_NK):
            form = "bfloat16"
        outputs, inputs = weight_NK.shape
        assert inputs % (GROUP if form in CODE_MAX else 2) == 0
        missing = -outputs % self.columns
        if missing:
            weight_NK = torch.cat((weight_NK, weight_NK.new_zeros(missing, inputs)))
        panels, scales = weight_NK.view(-1, self.columns, inputs), None
        if form == "float32":
            data = panels.float().transpose(1, 2)
        elif form == "bfloat16":
            data = _pairs(panels.bfloat16())
        else:
            codes, scales = quantize(panels, form)
            data, scales = codes.transpose(1, 2), scales.transpose(1, 2).contiguous()
            if form == "int4":
                low, high = (_pairs(codes) + 8).to(torch.uint8).unbind(-1)
                data = low | high << 4
        bias = None if bias is None else torch.cat((bias.float(), torch.zeros(missing)))
        return Packed(room(data.shape, data.dtype).copy_(data), scales, bias, form, outputs, inputs)

    def forward(
        self, shape: Shape, layers: "ctypes.Array[Layer]", step: Step, x_ME: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """All layers, in the place of `x`. cos and sin are M × 1 × D."""
        assert x_ME.is_contiguous()
        step.cos, step.sin = cos.data_ptr(), sin.data_ptr()
        self._lib.forward(shape, layers, step, x_ME.data_ptr())
        return x_ME

    def linear(self, x_MK: Tensor, weight: Packed) -> Tensor:
        """x · Wᵀ + bias, M × N. A row's result does not depend, to the bit, on the rows beside it."""
        assert x_MK.stride(1) == 1
        y = torch.empty(len(x_MK), weight.outputs)
        self._lib.linear(weight.c, x_MK.data_ptr(), x_MK.stride(0), len(x_MK), y.data_ptr(), torch.get_num_threads())
        return y

    def rows(self, weight: Packed, ids_M: Tensor) -> Tensor:
        """Rows of a float32 or bfloat16 weight, M × K in float32: an embedding's look-up in the head's own memory."""
        y = torch.empty(len(ids_M), weight.inputs)
        self._lib.rows_of(weight.c, ids_M.data_ptr(), len(ids_M), y.data_ptr(), torch.get_num_threads())
        return y

    def rms_norm(self, x_MK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
        x_MK = x_MK.contiguous()
        y = torch.empty_like(x_MK)
        rows, size = x_MK.shape
        self._lib.rms_norm(x_MK.data_ptr(), weight_K.data_ptr(), eps, rows, size, y.data_ptr(), torch.get_num_threads())
        return y

    def rotate(self, x_MHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions, in the place of `x`. cos and sin are M × 1 × D."""
        rows, heads, dim = x_MHD.shape
        assert x_MHD.stride()[1:] == (dim, 1)
        self._lib.rotate(
            x_MHD.data_ptr(), x_MHD.stride(0), rows, heads, dim, cos.data_ptr(), sin.data_ptr(), torch.get_num_threads()
        )
        return x_MHD

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        """silu(gate) · up, where a row is gate and then up."""
        rows, twice = gate_up.shape
        y = torch.empty(rows, twice // 2)
        self._lib.silu_multiply(gate_up.data_ptr(), rows, twice // 2, y.data_ptr(), torch.get_num_threads())
        return y

    def attend(self, q_MHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, cache: Tensor, step: Step) -> Tensor:
        """Stores keys and values in one layer's `cache`, and returns each token's attention over its sequence, M × H·D."""
        rows, heads, dim = q_MHD.shape
        q, k, v = (t if t.stride(1) == dim and t.stride(0) == q_MHD.stride(0) else None for t in (q_MHD, k_MKD, v_MKD))
        if q is None or k is None or v is None:
            q, k, v = torch.cat((q_MHD, k_MKD, v_MKD), dim=1).split((heads, k_MKD.shape[1], k_MKD.shape[1]), dim=1)
        shape = Shape(heads=heads, kv_heads=k.shape[1], dim=dim, half_cache=cache.dtype == torch.bfloat16)
        layer, out = Layer(cache=cache.data_ptr()), torch.empty(rows, heads * dim)
        self._lib.attend(shape, layer, step, q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), out.data_ptr())
        return out


def room(shape: Seq[int], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor; much of it in huge pages, whose addresses the processor looks up far less often."""
    count = torch.Size(shape).numel()
    if count * dtype.itemsize < HUGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def _is_bfloat16(weight_NK: Tensor) -> bool:
    return not any((part.float().view(torch.int32) & 0xFFFF).any() for part in weight_NK.split(1024))


def _pairs(panels: Tensor) -> Tensor:
    """panel × C × K → panel × K/2 × C × 2."""
    return panels.unflatten(2, (-1, 2)).permute(0, 2, 1, 3)


@cache
def kernels() -> Kernels | str:
    """The kernels, proven against torch on this machine; or why there are none, in a few words."""
    try:
        made = Kernels(library())
    except Unavailable as error:
        return str(error)
    return made if _agrees(made) else "the compiled kernels do not agree with torch on this processor"


def _agrees(made: Kernels) -> bool:
    """A compiler or a processor that computes something else is found here, and not in an answer."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 320, generator=g), torch.randn(70, 320, generator=g)
    for form, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
        expected = x @ weight.T
        found = made.linear(x, made.pack(weight, form))
        if not torch.allclose(found, expected, rtol=0, atol=tolerance * float(expected.abs().max())):
            return False
    return _attention_agrees(made, g)


def _attention_agrees(made: Kernels, g: torch.Generator) -> bool:
    """One prompt of two blocks and a half, which in the cache lie one after the other."""
    size = made.block_tokens
    q, k, v = torch.randn(5 * size // 2, 8, 32, generator=g).split((4, 2, 2), dim=1)
    items, tables, slots = np.array([0, len(q), 0, 0]), np.arange(3), np.arange(len(q))
    step = Step(
        rows=len(q), items=items.ctypes.data, num_items=1, tables=tables.ctypes.data, slots=slots.ctypes.data,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    found = made.attend(q, k, v, torch.zeros(3, 2, 2, size * 32), step)
    query, key, value = (t.transpose(0, 1) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return torch.allclose(found, expected.transpose(0, 1).flatten(1), atol=1e-5)
