"""Attention over the paged cache by gathering blocks for torch's SDPA. Runs on CPU and GPU alike.

Shapes: N tokens of the step, B decoding sequences, T tokens of one prompt chunk, S cached positions, H query heads,
K key-value heads, G = H / K query heads that share one, D head size, P tokens in a block.

The pool of a layer is rows of P × D: row (block·2 + kv)·K + head. A gather of rows in (kv, sequence, head, block) order
is then at once the contiguous 2 × B × K × S × D that SDPA is fastest on, in one copy.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from serving.engine.scheduler import Scheduled

GROUP_COST_BLOCKS = 32  # a group's fixed cost, as the padding that takes as long (measured on CPU: 16 to 64 are alike)


class Plan(Protocol):
    """The `Attend` of one step, and the positions that it computes, N."""

    positions: np.ndarray

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor: ...


class Pool(Protocol):
    """The cache's memory, as the engine knows it: this file's for torch, `attention_cpu` for compiled kernels.

    `layers` are tensors that begin with all blocks' content, block after block: num_blocks parts of equal size.
    """

    layers: list[Tensor]
    device: torch.device

    def plan(self, batch: Seq[Scheduled]) -> Plan: ...


class KVPool:
    """The cache's memory: a tensor a layer. Zeroed, since a masked NaN in uninitialised memory is still a NaN."""

    def __init__(
        self, *, layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        rows = num_blocks * 2 * kv_heads
        self.layers = [torch.zeros(rows, block_size, head_dim, dtype=dtype, device=device) for _ in range(layers)]
        self.block_size, self.kv_heads, self.head_dim, self.device = block_size, kv_heads, head_dim, device
        # (kv, head) → the row's offset in a block, to be added to block · 2K
        self._row_offsets = np.arange(2 * kv_heads).reshape(2, 1, kv_heads, 1)
        self._scratch = torch.empty(0, block_size, head_dim, dtype=dtype, device=device)

    def plan(self, batch: Seq[Scheduled]) -> "StepAttention":
        return StepAttention(self, batch)

    def rows(self, block_tables: np.ndarray) -> Tensor:
        """The rows of B × n blocks, in the order of a gather: 2 · B · K · n."""
        rows = block_tables[None, :, None, :] * (2 * self.kv_heads) + self._row_offsets
        return torch.from_numpy(rows.reshape(-1)).to(self.device)

    def slots(self, blocks: np.ndarray, offsets: np.ndarray) -> Tensor:
        """Where N tokens' keys and values go, in units of D values: N · 2 · K."""
        rows = blocks[:, None] * (2 * self.kv_heads) + np.arange(2 * self.kv_heads)
        return torch.from_numpy((rows * self.block_size + offsets[:, None]).reshape(-1)).to(self.device)

    def write(self, layer: int, slots: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> None:
        """What is no number is kept as 0: whoever has the block next masks it, and a masked NaN is still a NaN."""
        kv = torch.stack((k_NKD, v_NKD), dim=1).view(-1, self.head_dim).nan_to_num_(0.0, 0.0, 0.0)
        self.layers[layer].view(-1, self.head_dim).index_copy_(0, slots, kv)

    def past(self, layer: int, rows: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each B × K × S × D, in memory of their own; S is 0 where there are no rows."""
        if rows is None:
            none = self.layers[layer].new_empty(batch, self.kv_heads, 0, self.head_dim)
            return none, none
        k, v = self.layers[layer][rows].view(2, batch, self.kv_heads, -1, self.head_dim).unbind(0)
        return k, v

    def gather(self, layer: int, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each B × K × S × D, in memory that the next gather overwrites.

        Kept memory, because a fresh allocation of this size is given back to the system, and faulted in, every time.
        """
        if len(rows) > len(self._scratch):
            self._scratch = torch.empty(
                2 * len(rows), *self._scratch.shape[1:], dtype=self._scratch.dtype, device=self.device
            )
        out = self._scratch[: len(rows)]
        torch.index_select(self.layers[layer], 0, rows, out=out)
        k, v = out.view(2, batch, self.kv_heads, -1, self.head_dim).unbind(0)
        return k, v


class Decodes(NamedTuple):
    """Sequences [start, stop) of the flat batch, one token each, padded to the longest of them."""

    start: int
    stop: int
    rows: Tensor
    mask_B11S: Tensor


class Chunk(NamedTuple):
    """A prompt's tokens in this step: [start, stop) of the flat batch, and the cached past they look back on."""

    start: int
    stop: int
    rows: Tensor | None  # None: nothing came before, so the chunk's own keys and values are all there is
    mask_TS: Tensor | None


class StepAttention:
    """The `Attend` of one step (see model/llama.py).

    In the flat batch decoding sequences come first, longest first, so that neighbours need little padding; then chunks.
    """

    def __init__(self, pool: KVPool, batch: Seq[Scheduled]) -> None:
        self.pool = pool
        num_decodes = next((i for i, item in enumerate(batch) if item.num_tokens > 1), len(batch))
        self.positions = positions_of(batch)
        self.slots = self._slots(batch)
        self.decodes = self._plan_decodes(batch[:num_decodes])
        self.chunks = self._plan_chunks(batch[num_decodes:], start=num_decodes)

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        self.pool.write(layer, self.slots, k_NKD, v_NKD)
        parts = [self._decode(layer, group, q_NHD[group.start : group.stop]) for group in self.decodes]
        for chunk in self.chunks:
            part = slice(chunk.start, chunk.stop)
            parts.append(self._chunk(layer, chunk, q_NHD[part], k_NKD[part], v_NKD[part]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write(self, layer: int, start: int, stop: int, k_NKD: Tensor, v_NKD: Tensor) -> None:
        """Stores what rows [start, stop) of the flat batch add to the cache."""
        each = 2 * self.pool.kv_heads
        self.pool.write(layer, self.slots[start * each : stop * each], k_NKD, v_NKD)

    def _decode(self, layer: int, group: Decodes, q_BHD: Tensor) -> Tensor:
        k, v = self.pool.gather(layer, group.rows, len(q_BHD))
        # The G query heads that share a key head stand where SDPA has query positions: no key is copied G times.
        q_BKGD = q_BHD.reshape(len(q_BHD), self.pool.kv_heads, -1, self.pool.head_dim)
        return F.scaled_dot_product_attention(q_BKGD, k, v, attn_mask=group.mask_B11S).reshape(len(q_BHD), -1)

    def _chunk(self, layer: int, chunk: Chunk, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        q = q_THD.transpose(0, 1).unsqueeze(0)
        if chunk.rows is None:
            k, v = k_TKD.transpose(0, 1).unsqueeze(0), v_TKD.transpose(0, 1).unsqueeze(0)
        else:
            k, v = self.pool.gather(layer, chunk.rows, 1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=chunk.mask_TS, is_causal=chunk.mask_TS is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1).reshape(len(q_THD), -1)

    def _slots(self, batch: Seq[Scheduled]) -> Tensor:
        size = self.pool.block_size
        blocks = np.concatenate([_blocks_of(item)[_span(item) // size] for item in batch])
        return self.pool.slots(blocks, self.positions % size)

    def _plan_decodes(self, batch: Seq[Scheduled]) -> list[Decodes]:
        """Cuts the decoding sequences into groups where padding would cost more than another group does."""
        widths = [item.seq.num_computed // self.pool.block_size + 1 for item in batch]
        groups, start, padding = [], 0, 0
        for index, width in enumerate(widths):
            padding += widths[start] - width
            if padding > GROUP_COST_BLOCKS:
                groups.append(self._group(batch, start, index, widths[start]))
                start, padding = index, 0
        if batch:
            groups.append(self._group(batch, start, len(batch), widths[start]))
        return groups

    def _group(self, batch: Seq[Scheduled], start: int, stop: int, width: int) -> Decodes:
        tables = np.zeros((stop - start, width), dtype=np.int64)  # shorter sequences read block 0, and mask it
        for row, item in enumerate(batch[start:stop]):
            table = item.seq.block_table[:width]
            tables[row, : len(table)] = table
        lengths = np.array([item.seq.num_computed + 1 for item in batch[start:stop]])
        hidden = np.arange(width * self.pool.block_size) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.pool.layers[0].dtype)
        mask.masked_fill_(torch.from_numpy(hidden), float("-inf"))
        return Decodes(start, stop, self.pool.rows(tables), mask[:, None, None, :].to(self.pool.device))

    def _plan_chunks(self, batch: Seq[Scheduled], *, start: int) -> list[Chunk]:
        chunks = []
        for item in batch:
            stop = start + item.num_tokens
            rows = mask = None
            if item.seq.num_computed:
                end = item.seq.num_computed + item.num_tokens
                width = -(-end // self.pool.block_size)
                rows = self.pool.rows(_blocks_of(item)[None, :width])
                visible = np.arange(width * self.pool.block_size) <= _span(item)[:, None]
                mask = torch.from_numpy(visible).to(self.pool.device)
            chunks.append(Chunk(start, stop, rows, mask))
            start = stop
        return chunks


def _span(item: Scheduled) -> np.ndarray:
    """The positions that one sequence computes in this step."""
    return np.arange(item.seq.num_computed, item.seq.num_computed + item.num_tokens)


def positions_of(batch: Seq[Scheduled]) -> np.ndarray:
    return np.concatenate([_span(item) for item in batch])


def _blocks_of(item: Scheduled) -> np.ndarray:
    return np.array(item.seq.block_table, dtype=np.int64)
