"""The compiled kernels as functions of tensors, and the forms in which they want weights. See linear.cpp, attention.cpp.

Shapes: M rows of a batch, N outputs, K inputs, C columns of a panel (two vectors), G inputs that share a scale.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from serving.kernels.build import Unavailable, library
from serving.model.quantized import CODE_MAX, GROUP, quantize

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}


@dataclass(frozen=True)
class Packed:
    """A weight N × K as panels: `data` is panel × K × C (bfloat16: panel × K/2 × C × 2; int4: two values of K a byte).

    `scales` is panel × K/G × C in float32 for int8 and int4, where a value is its code times its group's scale.
    """

    data: Tensor
    scales: Tensor | None
    form: str
    outputs: int
    inputs: int

    def rows(self, ids_M: Tensor) -> Tensor:
        """Rows of a float32 or bfloat16 weight, M × K in float32: an embedding's look-up in the head's own memory."""
        columns = self.data.shape[2]
        picked = self.data[ids_M // columns, :, ids_M % columns]
        return picked.reshape(len(ids_M), -1)[:, : self.inputs].float()


class Kernels:
    """Calls into the library. Every tensor is on the CPU; activations are float32 with contiguous rows."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        n, p = ctypes.c_long, ctypes.c_void_p
        lib.linear.argtypes = [p, n, n, p, p, n, n, n, p, n, p, n]
        lib.rms_norm.argtypes = [p, p, ctypes.c_float, n, n, p, n]
        lib.silu_multiply.argtypes = [p, n, n, p, n]
        lib.attend.argtypes = [p, p, p, n, p, n, n, n, n, p, n, p, p, n]
        for function in (lib.linear, lib.rms_norm, lib.silu_multiply, lib.attend):
            function.restype = None
        for function in (lib.panel_columns, lib.group_inputs, lib.block_tokens):
            function.argtypes, function.restype = [], n
        self.columns, self.block_tokens = lib.panel_columns(), lib.block_tokens()
        assert lib.group_inputs() == GROUP
        self._room = torch.empty(0)

    def pack(self, weight_NK: Tensor, form: str) -> Packed:
        """The weight in one of `FORMATS`. K must be even, and a multiple of G for int8 and int4."""
        outputs, inputs = weight_NK.shape
        assert inputs % (GROUP if form in CODE_MAX else 2) == 0
        missing = -outputs % self.columns
        if missing:
            weight_NK = torch.cat((weight_NK, weight_NK.new_zeros(missing, inputs)))
        panels = weight_NK.view(-1, self.columns, inputs)
        if form == "float32":
            return Packed(panels.float().transpose(1, 2).contiguous(), None, form, outputs, inputs)
        if form == "bfloat16":
            return Packed(_pairs(panels.bfloat16()), None, form, outputs, inputs)
        codes, scales = quantize(panels, form)
        if form == "int8":
            data = codes.transpose(1, 2).contiguous()
        else:
            low, high = (_pairs(codes) + 8).to(torch.uint8).unbind(-1)
            data = low | high << 4
        return Packed(data, scales.transpose(1, 2).contiguous(), form, outputs, inputs)

    def linear(self, x_MK: Tensor, weight: Packed) -> Tensor:
        """x · Wᵀ, M × N. A row's result does not depend, to the bit, on the rows beside it."""
        assert x_MK.stride(1) == 1
        rows = len(x_MK)
        y = torch.empty(rows, weight.outputs)
        if self._room.numel() < x_MK.numel():
            self._room = torch.empty(x_MK.numel())
        self._lib.linear(
            x_MK.data_ptr(), x_MK.stride(0), rows, weight.data.data_ptr(),
            None if weight.scales is None else weight.scales.data_ptr(), FORMATS[weight.form],
            weight.outputs, weight.inputs, y.data_ptr(), y.stride(0), self._room.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y

    def rms_norm(self, x_MK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
        x_MK = x_MK.contiguous()
        y = torch.empty_like(x_MK)
        rows, size = x_MK.shape
        self._lib.rms_norm(x_MK.data_ptr(), weight_K.data_ptr(), eps, rows, size, y.data_ptr(), torch.get_num_threads())
        return y

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        """silu(gate) · up, where a row is gate and then up."""
        rows, twice = gate_up.shape
        y = torch.empty(rows, twice // 2)
        self._lib.silu_multiply(gate_up.data_ptr(), rows, twice // 2, y.data_ptr(), torch.get_num_threads())
        return y

    def attend(
        self, q_MHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, cache: Tensor, *, items: np.ndarray, tables: np.ndarray
    ) -> Tensor:
        """Stores keys and values in one layer's `cache`, and returns each token's attention over its sequence, M × H·D.

        `items` is int64: a row for each sequence (its first row, tokens, tokens computed before, start in `tables`).
        """
        rows, heads, dim = q_MHD.shape
        q, k, v = (t if t.stride(1) == dim and t.stride(0) == q_MHD.stride(0) else None for t in (q_MHD, k_MKD, v_MKD))
        if q is None or k is None or v is None:
            q, k, v = torch.cat((q_MHD, k_MKD, v_MKD), dim=1).split((heads, k_MKD.shape[1], k_MKD.shape[1]), dim=1)
        out = torch.empty(rows, heads * dim)
        self._lib.attend(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), cache.data_ptr(), cache.dtype == torch.bfloat16,
            heads, k.shape[1], dim, items.ctypes.data, len(items), tables.ctypes.data, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out


def _pairs(panels: Tensor) -> Tensor:
    """panel × C × K → panel × K/2 × C × 2."""
    return panels.unflatten(2, (-1, 2)).permute(0, 2, 1, 3).contiguous()


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
    return True
