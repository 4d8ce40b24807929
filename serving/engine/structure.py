"""Structured output: which tokens may come next so that the answer fits a JSON schema, a regular expression or a grammar.

The automata are llguidance's, whose limits on states and steps also bound what a hostile expression can cost.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from serving.engine.background import be_patient
from serving.engine.messages import Structure

if TYPE_CHECKING:
    import llguidance

# What one expression may cost at once: nested counts such as (a{1000}){1000} took 4 s with the library's own million,
# and 0.1 s of a thread with this; lists of forty objects with twenty patterns still pass.
LEXER_FUEL = 50_000
KEPT = 32  # structures that were asked for of late: most clients have a few, and send them again and again


class Matcher:
    """One answer's place in its structure. `error` says what went wrong on the way, such as a limit that was met."""

    def __init__(self, matcher: "llguidance.LLMatcher") -> None:
        self._matcher = matcher

    @property
    def error(self) -> str:
        return self._matcher.get_error()

    @property
    def complete(self) -> bool:
        """Nothing may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> bytes:
        """A bit for each token of the vocabulary, lowest first."""
        return self._matcher.compute_bitmask()

    def advance(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    def copy(self) -> "Matcher":
        return Matcher(self._matcher.deep_copy())


class Structures:
    """Makes matchers for one model's tokens, one after another, by a thread that all others go before."""

    def __init__(self, root: Path, *, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._root, self._vocab_size, self._eos_ids = root, vocab_size, eos_ids
        self._tokenizer: llguidance.LLTokenizer | None = None  # made at the first use: it takes a while
        self._made: OrderedDict[Structure, Matcher | ValueError] = OrderedDict()  # the last used one last
        self._thread = ThreadPoolExecutor(1, "structures", initializer=be_patient)

    def begin(self, structure: Structure) -> "Future[Matcher]":
        """A matcher at the beginning of `structure`, or the `ValueError` that says why there can be none."""
        return self._thread.submit(self._matcher, structure)

    def _matcher(self, structure: Structure) -> Matcher:
        if structure not in self._made:
            try:
                self._made[structure] = self._compile(structure)
            except ValueError as error:
                self._made[structure] = error
            if len(self._made) > KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(structure)
        match self._made[structure]:
            case Matcher() as made:
                return made.copy()
            case error:
                raise error

    def _compile(self, structure: Structure) -> Matcher:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        if self._tokenizer is None:
            text = (self._root / "tokenizer.json").read_text(encoding="utf-8")
            eos = sorted(self._eos_ids) or None
            self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos and eos[0])
        compile_ = {
            # Free space between the parts would let a small model write nothing but space until its tokens run out.
            "json_schema": partial(LLMatcher.grammar_from_json_schema, overrides={"whitespace_flexible": False}),
            "regex": LLMatcher.grammar_from_regex,
            "grammar": LLMatcher.grammar_from_lark,
        }
        limits = LLParserLimits(initial_lexer_fuel=LEXER_FUEL, step_lexer_fuel=LEXER_FUEL)
        made = Matcher(LLMatcher(self._tokenizer, compile_[structure.kind](structure.text), limits=limits))
        made.allowed()  # where an automaton is hostile this takes long, and what it costs later builds on it
        if made.error:
            raise ValueError(made.error)
        return made


def mask(logits_BV: Tensor, matchers: list[Matcher]) -> Tensor:
    """The logits with −∞ at every token that a row's matcher does not allow.

    A matcher that fails now allows all: its `error` is seen, and its answer ended, once the token is drawn.
    """
    vocab = logits_BV.shape[1]
    rows = np.stack([np.frombuffer(matcher.allowed(), dtype=np.uint8) for matcher in matchers])
    bits = np.unpackbits(rows, axis=1, bitorder="little")[:, :vocab].astype(bool)
    bits[~bits.any(axis=1)] = True
    return logits_BV.masked_fill(~torch.from_numpy(bits).to(logits_BV.device), float("-inf"))
