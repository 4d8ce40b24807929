"""Paged memory for keys and values: which block belongs to whom, and which old blocks can be used again.

A block holds `block_size` tokens of one sequence in every layer. Full blocks are known by a hash chained over
all tokens before them, so that a prompt that begins like an earlier one shares its blocks instead of computing them.
A shared block is freed when its last owner lets go; it keeps its content, and can be found again, until it is needed.
(The scheme of PagedAttention, arXiv 2309.06180, and of vLLM's prefix cache.)
"""

import hashlib
from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from serving.engine.sequence import Sequence

if TYPE_CHECKING:
    from serving.engine.spill import Spill


class BlockManager:
    def __init__(self, *, num_blocks: int, block_size: int, spill: "Spill | None" = None) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.spill = spill
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def used_ratio(self) -> float:
        return 1.0 - len(self._free) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> None:
        """Gives a new or preempted sequence the cached blocks that its tokens begin with, and counts them as computed.

        At least one token is left to compute: sampling needs the last token's logits. A sequence that reports its
        prompt's logprobs needs every token's, and takes none.
        """
        assert not seq.block_table
        if seq.params.prompt_logprobs:
            return
        shareable = (len(seq) - 1) // self.block_size
        self._extend_hashes(seq, shareable)
        for key in seq.block_hashes[:shareable]:
            block = self._block_of.get(key)
            if block is None:
                break
            self._references[block] += 1
            self._free.pop(block, None)
            seq.block_table.append(block)
        self._fetch(seq, shareable)
        seq.num_published = len(seq.block_table)
        seq.num_computed = seq.num_published * self.block_size

    def _fetch(self, seq: Sequence, shareable: int) -> None:
        """Goes on with the prefix where memory ends: from the store of blocks given up, or filled by others."""
        keys = seq.block_hashes[len(seq.block_table) : shareable]
        if self.spill is None or not keys or not self._free:
            return
        for key, content in zip(keys, self.spill.find(keys[: len(self._free)]), strict=False):
            block = self._take()
            self.spill.load(content, block)
            if key not in self._block_of:  # one after a gap may be here still
                self._hash_of[block], self._block_of[key] = key, block
            seq.block_table.append(block)

    def _take(self) -> int:
        """The block that was used least of late, now owned once."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Makes room for the sequence's first `num_tokens` tokens. False, and nothing changed, when memory is short."""
        missing = self.blocks_for(num_tokens) - len(seq.block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            seq.block_table.append(self._take())
        return True

    def publish(self, seq: Sequence) -> None:
        """Lets other sequences find the blocks that the sequence has filled. Called after a step computed them."""
        full = seq.num_computed // self.block_size
        if full == seq.num_published:
            return
        self._extend_hashes(seq, full)
        for index in range(seq.num_published, full):
            block, key = seq.block_table[index], seq.block_hashes[index]
            if key not in self._block_of:  # else a twin was computed at the same time: the first is the one to find
                self._hash_of[block] = key
                self._block_of[key] = block
                if self.spill is not None and self.spill.store.shared:
                    self.spill.save(key, block)
        seq.num_published = full

    def release(self, seq: Sequence) -> None:
        """Takes all blocks back. The sequence can start over (preemption) or is done."""
        # Last block first: an old prefix is worth more than what followed it, so it is the last to be reused.
        for block in reversed(seq.block_table):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if self._references[block] == 0:
                self._free[block] = None
        seq.block_table.clear()
        seq.num_computed = seq.num_published = 0

    def _forget(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            if self.spill is not None and not self.spill.store.shared:
                self.spill.save(key, block)
            del self._block_of[key]
            self._hash_of[block] = None

    def _extend_hashes(self, seq: Sequence, count: int) -> None:
        """Hashes the sequence's first `count` blocks. sha256: a collision would show one user another's text.

        Another adapter makes other keys and values of the same tokens, so the chain begins with the adapter's digest.
        """
        root = b"" if seq.adapter is None else bytes.fromhex(seq.adapter.digest)
        for index in range(len(seq.block_hashes), count):
            before = seq.block_hashes[-1] if index else root
            tokens = array("I", seq.token_ids[index * self.block_size : (index + 1) * self.block_size])
            seq.block_hashes.append(hashlib.sha256(before + tokens.tobytes()).digest())
