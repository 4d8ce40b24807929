"""How much of prompts a step may take while others decode, learnt from how long steps take.

    seconds = step + decodes × decode + prompt × token

by least squares of the relative errors, in which older steps count less and less. `prompt` is the arithmetic of the
prompts' tokens, in tokens at the beginning of a text: one further on costs more, since it looks back on more. A chunk
is as long as makes the step `STRETCH` times one that only decodes, so that a long prompt slows the others' tokens by no
more, and is itself never stopped. It grows step by step, since a step that waits for memory has room for tokens that
cost nothing until there are too many of them, which the line cannot say. Where more sequences wait for their first token
than would be held up, they may hold them up by as many times more: those who wait are then the many.
"""

import math
from dataclasses import dataclass

import numpy as np

STRETCH = 2.1  # below the 3 that is promised of the 99th percentile: times scatter, and a line is not all there is
LEAST_TOKENS = 16
GROWTH = 1.25  # of a chunk beside decodes, over the longest of late
KEPT = 0.95  # of what the steps before have said, at each step
ANCHOR = 0.01  # of one step's weight: how firmly what the steps leave open stays as it was measured at first
LEAST_SHARE = 0.05  # of what was measured at first: no cost is believed to be less


@dataclass
class Allowance:
    """What a step may yet take of prompts: so many tokens, and so much arithmetic."""

    tokens: int
    work: float  # in tokens at the beginning of a text
    look: float  # what a token costs more for each position that it looks back on, in the same

    @property
    def has_room(self) -> bool:
        return self.tokens > 0 and self.work >= 1

    def take(self, *, wanted: int, computed: int) -> int:
        """So many of the `wanted` tokens that follow the `computed` ones as there is room for, which are then taken."""
        if not self.has_room:
            return 0
        by = 1 + self.look * computed
        # n tokens are n · (by + look · n / 2) of work; the root, in the form that is exact for a small `look` too.
        # There may be no end of work, and there is one of tokens.
        work = min(self.work, prompt_work(wanted, computed, look=self.look))
        fits = 2 * work / (by + math.sqrt(by * by + 2 * self.look * work))
        count = min(wanted, self.tokens, max(1, int(fits + 1e-6)))
        self.tokens -= count
        self.work -= prompt_work(count, computed, look=self.look)
        return count


def prompt_work(count: int, computed: int, *, look: float) -> float:
    """The arithmetic of `count` tokens that follow the `computed` ones, in tokens at the beginning of a text."""
    return count * (1 + look * (computed + count / 2))


class Pace:
    def __init__(self, *, look: float) -> None:
        """`look`: what a token costs more for each position that it looks back on, in tokens at a text's beginning."""
        self.look = look
        self._products, self._sums = np.zeros((3, 3)), np.zeros(3)
        self._longest, self._many = float(LEAST_TOKENS), 1.0  # of late, beside decodes, where they were not the many
        self._first: np.ndarray | None = None  # the costs (step, decode, token) in seconds, as measured at first

    def learn(self, *, decodes: int, prompt: float, seconds: float) -> None:
        """One step's time, with what it computed; `prompt` as `prompt_work` counts it."""
        row = np.array((1.0, decodes, prompt)) / seconds
        self._products = KEPT * self._products + np.outer(row, row)
        self._sums = KEPT * self._sums + row
        if decodes and prompt:
            self._longest = max(KEPT * self._longest, prompt / self._many)

    def settle(self) -> None:
        """Takes what the steps so far have said as measured. They must have been of more than one kind."""
        each = np.sqrt(1 / self._products.diagonal()) / 3  # were a third of a step's time due to each
        self._first = self._costs(each, anchor=1e-3)

    def allowance(self, *, decoding: int, first_tokens: int, most: int) -> Allowance:
        """Of the next step, where `decoding` sequences would wait for it and `first_tokens` others for their first."""
        if decoding == 0 or self._first is None:
            return Allowance(most, math.inf, self.look)
        step_s, decode_s, token_s = self._costs(self._first, anchor=ANCHOR)
        self._many = max(1.0, first_tokens / decoding)
        work = min((STRETCH - 1) * (step_s + decode_s * decoding) / token_s, GROWTH * self._longest)
        return Allowance(most, self._many * max(LEAST_TOKENS, work), self.look)

    def _costs(self, first: np.ndarray, *, anchor: float) -> np.ndarray:
        """(step, decode, token): those that the steps say, and where they leave it open nearest to `first`."""
        # Of a step that `first` explains each cost's relative error weighs `anchor`.
        weight = anchor / first**2
        found = np.linalg.solve(self._products + np.diag(weight), self._sums + weight * first)
        return np.maximum(found, LEAST_SHARE * first)
