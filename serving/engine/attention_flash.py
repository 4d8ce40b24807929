"""FlashAttention over the paged cache, which reads blocks where they lie: torch's `varlen_attn` with block tables.

Asked for by `--attention flash`, on CUDA and in 16 bits. Not the default: the project's tests have no GPU, where only
the plans and the padding of batches are held against attention by SDPA (tests/unit/serving/test_serve_flash.py).

Shapes: N tokens of the step, B sequences, W blocks of the longest, P tokens in a block, H, K, D as in attention.py.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from serving.engine.scheduler import Scheduled

FLASH_BLOCK_TOKENS = 256  # FlashAttention 2 wants the length of a block to be a multiple of this


class FlashPool:
    """A tensor a layer: block × (k, v) × P × K × D, and behind the cache's blocks one that belongs to nobody."""

    def __init__(
        self, *, layers: int, num_blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device,
        block_size: int, attend: Callable[..., Any] = varlen_attn,
    ) -> None:  # fmt: skip
        shape = (num_blocks + 1, 2, block_size, kv_heads, head_dim)
        self._all = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.layers = [layer[:num_blocks] for layer in self._all]
        self.spare_block, self.block_size, self.device, self._attend = num_blocks, block_size, device, attend

    def plan(self, batch: Seq[Scheduled]) -> "FlashStep":
        return FlashStep.of(self, batch)

    def attend(self, layer: int, step: "FlashStep", q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        blocks, at, offset = self._all[layer], step.slots_N // self.block_size, step.slots_N % self.block_size
        blocks[at, 0, offset], blocks[at, 1, offset] = k_NKD, v_NKD
        out = self._attend(
            q_NHD, blocks[:, 0], blocks[:, 1], step.starts, None, step.most_queries, step.most_keys,
            window_size=(-1, 0), enable_gqa=q_NHD.shape[1] != k_NKD.shape[1],
            seqused_k=step.lengths_B, block_table=step.tables_BW,
        )  # fmt: skip
        return out.reshape(len(q_NHD), -1)


class FlashStep:
    """The `Attend` of one step: where its tokens go, and what each sequence looks back on."""

    def __init__(
        self, pool: FlashPool, *, queries: Seq[int], lengths: Seq[int], tables_BW: np.ndarray, most_keys: int
    ) -> None:
        self.pool, self.most_queries, self.most_keys = pool, max(queries), most_keys
        sequences = np.repeat(np.arange(len(queries)), queries)
        self.positions = np.concatenate([np.arange(end - n, end) for n, end in zip(queries, lengths, strict=True)])
        blocks = tables_BW[sequences, self.positions // pool.block_size]
        slots = blocks * pool.block_size + self.positions % pool.block_size
        self.slots_N = torch.from_numpy(slots).to(pool.device)
        self.starts = torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32, device=pool.device)
        self.lengths_B = torch.tensor(lengths, dtype=torch.int32, device=pool.device)
        self.tables_BW = torch.from_numpy(tables_BW.astype(np.int32)).to(pool.device)
        self.is_plain_decode = False

    @classmethod
    def of(cls, pool: FlashPool, batch: Seq[Scheduled]) -> "FlashStep":
        queries = [item.num_tokens for item in batch]
        lengths = [item.seq.num_computed + item.num_tokens for item in batch]
        tables = np.full((len(batch), -(-max(lengths) // pool.block_size)), pool.spare_block)
        for row, item in enumerate(batch):
            table = item.seq.block_table[: tables.shape[1]]
            tables[row, : len(table)] = table
        step = cls(pool, queries=queries, lengths=lengths, tables_BW=tables, most_keys=max(lengths))
        step.is_plain_decode = max(queries) == 1 and all(item.seq.adapter is None for item in batch)
        return step

    @classmethod
    def idle(cls, pool: FlashPool, *, sequences: int, max_model_len: int) -> "FlashStep":
        """Of so many sequences that are nobody's: what a graph is captured with, and what fills it up."""
        tables = np.full((sequences, -(-max_model_len // pool.block_size)), pool.spare_block)
        one = [1] * sequences
        return cls(pool, queries=one, lengths=one, tables_BW=tables, most_keys=max_model_len)

    def take_over(self, other: "FlashStep") -> None:
        """Becomes the other one, with sequences that are nobody's behind, in the memory that it has."""
        count, width = other.tables_BW.shape
        self.slots_N.fill_(self.pool.spare_block * self.pool.block_size)[:count].copy_(other.slots_N)
        self.lengths_B.fill_(1)[:count].copy_(other.lengths_B)
        self.tables_BW.fill_(self.pool.spare_block)[:count, :width].copy_(other.tables_BW)

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        return self.pool.attend(layer, self, q_NHD, k_NKD, v_NKD)
