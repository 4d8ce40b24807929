"""Who computes what in the next step: decoding first, then prompts in chunks, within a budget of tokens.

Every sequence is "so many tokens known, so many computed", so that a prompt, a chunk of one, a decoded token and a
preempted sequence's second prefill are one case. (Continuous batching: Orca, OSDI '22; mixed chunks: arXiv 2403.02310.)
"""

import time
from bisect import insort
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, NamedTuple

from serving.engine.block_manager import BlockManager
from serving.engine.fair_queue import FairQueue
from serving.engine.pace import Allowance, Pace
from serving.engine.sequence import Sequence
from serving.engine.speculation import NgramSpeculator
from serving.errors import Refused

if TYPE_CHECKING:
    from serving.engine.adapters import Adapters

PASSED_BY_S = 2.0  # how long others may go before a sequence whose adapter has no place
PRESSED_STEP_TOKENS = 64


class Scheduled(NamedTuple):
    seq: Sequence
    num_tokens: int  # to compute in this step, from seq.num_computed on, guesses included
    guess: Seq[int] = ()  # tokens that may follow those that are known

    @property
    def completes(self) -> bool:
        """True when all known tokens will be computed: the step then samples the next one."""
        return self.seq.num_computed + self.num_tokens - len(self.guess) == len(self.seq)

    @property
    def token_ids(self) -> list[int]:
        known = self.num_tokens - len(self.guess)
        return [*self.seq.token_ids[self.seq.num_computed : self.seq.num_computed + known], *self.guess]


class Scheduler:
    def __init__(
        self, blocks: BlockManager, *, adapters: "Adapters", pace: Pace, max_num_seqs: int, max_step_tokens: int,
        speculate_tokens: int = 0,
    ) -> None:  # fmt: skip
        assert max_step_tokens >= max_num_seqs
        self.blocks, self.adapters, self.pace = blocks, adapters, pace
        self.max_num_seqs, self.max_step_tokens = max_num_seqs, max_step_tokens
        self.speculator = NgramSpeculator(speculate_tokens)
        self.waiting = FairQueue()
        self.running: list[Sequence] = []  # highest priority first, then the oldest: the last one is preempted
        self.lost: list[tuple[Sequence, str]] = []  # those whose adapter could not be read, and why
        self.short_of_memory = False  # then nobody is let in beside those who run, and chunks are short
        self.preemptions = self.prefix_hit_tokens = self.prefix_miss_tokens = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.add(seq)

    def schedule(self) -> list[Scheduled]:
        """The next step's work; empty when there is none, or when `lost` is all that there is."""
        prompts = self._allowance()
        batch, preempted = self._schedule_running(prompts)
        if not preempted:
            self._admit(batch, prompts)
        return batch

    def remove(self, seq: Sequence) -> None:
        """Takes out a sequence that is finished or aborted, wherever it is, and its blocks back."""
        if seq in self.running:
            self.running.remove(seq)
            self.adapters.release(seq)
        else:
            self.waiting.remove(seq)
        self.waiting.forget(seq)
        self.blocks.release(seq)

    def _allowance(self) -> Allowance:
        decoding = sum(seq.num_uncomputed == 1 for seq in self.running)
        first_tokens = len(self.running) - decoding + len(self.waiting)
        most = PRESSED_STEP_TOKENS if self.short_of_memory else self.max_step_tokens
        return self.pace.allowance(decoding=decoding, first_tokens=first_tokens, most=most)

    def _schedule_running(self, prompts: Allowance) -> tuple[list[Scheduled], bool]:
        batch: list[Scheduled] = []
        budget, at, preempted = self.max_step_tokens, 0, False
        while at < len(self.running):
            seq = self.running[at]
            at += 1
            behind = len(self.running) - at  # a long prompt's chunk leaves each of these its token
            num_tokens = min(seq.num_uncomputed, budget - behind)
            if seq.num_uncomputed > 1:
                num_tokens = prompts.take(wanted=num_tokens, computed=seq.num_computed)
                if num_tokens == 0:
                    continue
            while not self.blocks.grow(seq, seq.num_computed + num_tokens):
                preempted = True
                if self._preempt() is seq:
                    return batch, True
            guess = self._guess(seq, budget - behind - num_tokens) if num_tokens == seq.num_uncomputed == 1 else []
            batch.append(Scheduled(seq, num_tokens + len(guess), guess))
            self.waiting.charge(seq, num_tokens)
            budget -= num_tokens + len(guess)
        return batch, preempted

    def _preempt(self) -> Sequence:
        """Throws the youngest of the lowest priority out of the batch, to be computed again."""
        last = self.running.pop()
        self.blocks.release(last)
        self.adapters.release(last)
        self.waiting.put_back(last)
        self.preemptions += 1
        return last

    def _guess(self, seq: Sequence, budget: int) -> list[int]:
        """Tokens to check beyond the known ones, where memory has room for them without taking anyone's."""
        guess = self.speculator.guess(seq, running=len(self.running))[: max(budget, 0)]
        return guess if self.blocks.grow(seq, len(seq) + len(guess)) else []

    def _admit(self, batch: list[Scheduled], prompts: Allowance) -> None:
        prompts.tokens = min(prompts.tokens, self.max_step_tokens - sum(item.num_tokens for item in batch))
        while self.waiting and prompts.has_room and len(self.running) < self.max_num_seqs:
            seq = None if self.short_of_memory and self.running else self._next()
            if seq is None:
                return
            self.blocks.match_prefix(seq)
            # Room for the whole of it, and a block for each one running: who is let in is not thrown out the step after.
            missing = self.blocks.blocks_for(len(seq)) - len(seq.block_table)
            if missing + len(self.running) > self.blocks.num_free:
                self.blocks.release(seq)
                return
            try:
                self.adapters.acquire(seq)
            except Refused as error:
                self.blocks.release(seq)
                self.waiting.remove(seq)
                self.waiting.forget(seq)
                self.lost.append((seq, str(error)))
                continue
            self.blocks.grow(seq, len(seq))
            self.waiting.remove(seq)
            insort(self.running, seq, key=lambda other: -other.priority)
            if seq.queue_s is None:
                seq.queue_s = time.monotonic() - seq.arrived_s
                seq.cached_tokens = seq.num_computed
                self.prefix_hit_tokens += seq.num_computed
                self.prefix_miss_tokens += seq.num_uncomputed
            num_tokens = prompts.take(wanted=seq.num_uncomputed, computed=seq.num_computed)
            batch.append(Scheduled(seq, num_tokens))
            self.waiting.charge(seq, num_tokens)

    def _next(self) -> Sequence | None:
        """Who is let in next. One whose adapter is not here is passed by; where others have its place, not for long.

        Without that end those whose adapters are here would keep it waiting for ever.
        """
        first = self.waiting.first()
        if self.adapters.here(first):
            return first
        self.adapters.bring(first)
        if self.adapters.held_up(first) and time.monotonic() - first.arrived_s > PASSED_BY_S:
            return None
        found = self.waiting.first_of(self.adapters.here)
        if found is None:  # so that no adapter which is here and unused is wanted by any of them
            for seq in self.waiting:
                self.adapters.bring(seq)
        return found
