"""Attention over the paged cache by the compiled kernel, which reads blocks where they lie (kernels/attention.h)."""

from collections.abc import Sequence as Seq
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from serving.engine.attention import positions_of
from serving.engine.scheduler import Scheduled
from serving.kernels.cpu import Kernels, Step


class CpuPool:
    """A tensor a layer: block × (k, v) × head × (tokens of a block · head size), in float32 or bfloat16."""

    def __init__(
        self, kernels: Kernels, *, layers: int, num_blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (num_blocks, 2, kv_heads, kernels.block_tokens * head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]
        self.kernels, self.device = kernels, torch.device("cpu")

    def plan(self, batch: Seq[Scheduled]) -> "CpuAttention":
        return CpuAttention(self, batch)


class CpuAttention:
    def __init__(self, pool: CpuPool, batch: Seq[Scheduled]) -> None:
        self.pool = pool
        self.positions = positions_of(batch)
        lengths = np.array([(item.num_tokens, item.seq.num_computed, len(item.seq.block_table)) for item in batch])
        items = np.empty((len(batch), 4), dtype=np.int64)  # first row, tokens, computed before, start in `tables`
        items[:, 1:3] = lengths[:, :2]
        items[:, 0] = np.cumsum(lengths[:, 0]) - lengths[:, 0]
        items[:, 3] = np.cumsum(lengths[:, 2]) - lengths[:, 2]
        blocks = chain.from_iterable(item.seq.block_table for item in batch)
        tables = np.fromiter(blocks, dtype=np.int64, count=int(lengths[:, 2].sum()))
        size = pool.kernels.block_tokens
        slots = tables[np.repeat(items[:, 3], lengths[:, 0]) + self.positions // size] * size + self.positions % size
        self.step = Step(
            rows=len(slots), items=items.ctypes.data, num_items=len(items), tables=tables.ctypes.data,
            slots=slots.ctypes.data, threads=torch.get_num_threads(),
        )  # fmt: skip
        self._kept = items, tables, slots  # while `step` points at them

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        return self.pool.kernels.attend(q_NHD, k_NKD, v_NKD, self.pool.layers[layer], self.step)
