"""One rank's share of a model, split as in Megatron-LM (arXiv 1909.08053): heads, feed-forward and vocabulary.

The model has no parallel code in it: a rank builds a narrower one, and puts a sum over the ranks behind each layer
whose inputs are split, and around the vocabulary's two ends.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from serving.errors import Refused
from serving.model.config import ModelConfig
from serving.model.llama import Llama

ROWS, COLUMNS = 0, 1
# The axis along which a layer's matrices are cut; what is not here is every rank's.
AXIS = {
    "embed": ROWS, "head": ROWS, "attention.qkv": ROWS, "ffn.gate_up": ROWS, "attention.out": COLUMNS, "ffn.down": COLUMNS,
}  # fmt: skip


class Shard(NamedTuple):
    rank: int
    size: int

    def each(self, total: int) -> int:
        return -(-total // self.size)

    def span(self, total: int) -> tuple[int, int]:
        """This rank's [start, stop) of `total`; the last ranks' may be shorter."""
        each = self.each(total)
        return min(self.rank * each, total), min((self.rank + 1) * each, total)


WHOLE = Shard(0, 1)


def narrowed(config: ModelConfig, size: int, *, where: str) -> ModelConfig:
    """The shape of one rank's share. Raises `Refused` for heads or widths that `size` does not divide."""
    if size == 1:
        return config
    for count, what in ((config.kv_heads, "key-value heads"), (config.heads, "heads"), (config.ffn, "feed-forward")):
        if count % size:
            fits = [n for n in range(1, 65) if not (config.kv_heads % n or config.heads % n or config.ffn % n)]
            fix = f"Give one of {', '.join(map(str, fits))}"
            raise Refused(f"--tensor-parallel-size {size} does not divide {count} {what}", where=where, fix=fix)
    return replace(
        config, heads=config.heads // size, kv_heads=config.kv_heads // size, ffn=config.ffn // size,
        vocab_size=-(-config.vocab_size // size),
    )  # fmt: skip


class Summed(nn.Module):
    """A layer that has this rank's inputs only: the ranks' outputs add up to the whole one's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        dist.all_reduce(y)
        return y


class SplitEmbedding(nn.Module):
    """Each rank looks up the tokens that are its own."""

    def __init__(self, base: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self.base, self.start, self.stop = base, start, stop

    def forward(self, ids: Tensor) -> Tensor:
        mine = (ids >= self.start) & (ids < self.stop)
        x = self.base(torch.where(mine, ids - self.start, 0)).masked_fill(~mine.unsqueeze(-1), 0.0)
        dist.all_reduce(x)
        return x


class SplitHead(nn.Module):
    """Rank 0 asks for logits of rows that it alone knows, so it sends them round; the others answer by `serve`."""

    def __init__(self, base: nn.Module, shard: Shard, vocab_size: int, ask: Callable[[int], None]) -> None:
        super().__init__()
        self.base, self.shard, self.vocab_size, self.ask = base, shard, vocab_size, ask

    def forward(self, x_NE: Tensor) -> Tensor:
        self.ask(len(x_NE))
        x_NE = x_NE.contiguous()
        dist.broadcast(x_NE, 0)
        part = self.base(x_NE)
        parts = [torch.empty_like(part) for _ in range(self.shard.size)]
        dist.gather(part, parts, 0)
        return torch.cat(parts, dim=-1)[:, : self.vocab_size]

    def serve(self, x_NE: Tensor) -> None:
        """`x_NE` is room for the rows."""
        dist.broadcast(x_NE, 0)
        dist.gather(self.base(x_NE), None, 0)


def join(model: Llama, shard: Shard, config: ModelConfig, *, ask: Callable[[int], None]) -> SplitHead:
    """Puts the sums into a rank's model, in place; `config` is the whole one's. `ask` tells the others of logits."""
    for block in model.blocks:
        for owner, child in ((block.attention, "out"), (block.ffn, "down")):
            setattr(owner, child, Summed(getattr(owner, child)))
    setattr(model, "embed", SplitEmbedding(model.embed, *shard.span(config.vocab_size)))  # noqa: B010
    head = SplitHead(model.head, shard, config.vocab_size, ask)
    setattr(model, "head", head)  # noqa: B010
    return head
