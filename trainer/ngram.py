"""Baselines that a language model has to beat: n-gram models over the same tokens, counted and scored with numpy.

Every distinct n-gram has a number. That of the n-gram that ends at position i is found from the number of the
(n-1)-gram that ends at i - 1 and the token at i, so that counting any order is one sort of 64-bit keys.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Array = np.ndarray
Score = Callable[[Array], Array]  # from tokens (n,) to the probability of each, given those before it (n,)
_EM_ROUNDS = 20
_EM_EVERY = 16  # four weights need no more than every sixteenth token


@dataclass(frozen=True)
class Order:
    """The distinct n-grams of one order, as sorted keys: number of the context × vocabulary + token."""

    keys: Array  # (distinct,)
    counts: Array  # (distinct,) times that each was seen
    numbers: Array  # (tokens,) of the n-gram that ends at each position of the training text; -1 where it is cut
    contexts: int  # how many distinct contexts there are: the distinct (n-1)-grams

    def find(self, keys: Array) -> Array:
        """Numbers of n-grams by key, -1 for those never seen."""
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)

    def context_totals(self, vocab_size: int) -> Array:
        """How often each context was seen, shape (contexts,)."""
        return np.bincount(self.keys // vocab_size, weights=self.counts, minlength=self.contexts)


def count_orders(tokens: Array, *, vocab_size: int, highest: int) -> list[Order]:
    """Orders 1 … `highest` of the training tokens, shape (tokens,)."""
    numbers, contexts, orders = np.zeros(len(tokens), dtype=np.int64), 1, []
    for order in range(1, highest + 1):
        before = np.concatenate([[-1], numbers[:-1]]) if order > 1 else numbers
        there = before >= 0
        keys, inverse, counts = np.unique(
            before[there] * vocab_size + tokens[there], return_inverse=True, return_counts=True
        )
        numbers = np.full(len(tokens), -1, dtype=np.int64)
        numbers[there] = inverse
        orders.append(Order(keys=keys, counts=counts, numbers=numbers, contexts=contexts))
        contexts = len(keys)
    return orders


def look_up(orders: list[Order], tokens: Array, *, vocab_size: int) -> list[tuple[Array, Array]]:
    """For each order the numbers of (context, n-gram) at every position of another text; -1 where never seen."""
    found, ending = [], np.zeros(len(tokens), dtype=np.int64)
    for index, order in enumerate(orders):
        context = np.concatenate([[-1], ending[:-1]]) if index else ending
        keys = context * vocab_size + tokens
        ending = np.where(context >= 0, order.find(keys), -1)
        found.append((context, ending))
    return found


def unigram(orders: list[Order], *, vocab_size: int) -> Score:
    """Add-one (Laplace) unigrams."""
    counts = np.ones(vocab_size)
    counts[orders[0].keys] += orders[0].counts
    probabilities = counts / counts.sum()
    return lambda tokens: probabilities[tokens]


def trigram(orders: list[Order], *, vocab_size: int) -> Score:
    """Interpolated trigrams (Jelinek and Mercer 1980): a weighted mean of uniform, 1-, 2- and 3-gram frequencies.

    The weights are found by EM on the training text, each token taken out of the counts that score it (deleted
    interpolation). Where a context was never seen, its weight goes to the orders below.
    """
    orders = orders[:3]
    columns = _deleted_frequencies(orders, vocab_size)
    weights = np.full(len(orders) + 1, 1 / (len(orders) + 1))
    for _ in range(_EM_ROUNDS):
        shares = weights * columns
        weights = (shares / shares.sum(1, keepdims=True)).mean(0)

    def probability(tokens: Array) -> Array:
        mixed, used = np.full(len(tokens), weights[0] / vocab_size), np.full(len(tokens), weights[0])
        found = look_up(orders, tokens, vocab_size=vocab_size)
        for weight, order, (context, gram) in zip(weights[1:], orders, found, strict=True):
            totals = order.context_totals(vocab_size)
            seen = (context >= 0) & (totals[context] > 0)
            mixed += np.where(gram >= 0, weight * order.counts[gram] / np.maximum(totals[context], 1), 0.0)
            used += np.where(seen, weight, 0.0)
        return mixed / used

    return probability


def _deleted_frequencies(orders: list[Order], vocab_size: int) -> Array:
    """Frequencies of training tokens in the counts without themselves, (sampled tokens, 1 + orders); uniform first."""
    at = np.arange(len(orders) - 1, len(orders[0].numbers), _EM_EVERY)
    columns = [np.full(len(at), 1 / vocab_size)]
    for order in orders:
        gram = order.numbers[at]
        rest = order.context_totals(vocab_size)[order.keys[gram] // vocab_size] - 1
        columns.append((order.counts[gram] - 1) / np.maximum(rest, 1))
    return np.stack(columns, 1)


def kneser_ney(orders: list[Order], *, vocab_size: int) -> Score:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3), with three discounts an order."""
    levels = [_Level.of(order, count, vocab_size) for order, count in zip(orders, _kept_counts(orders), strict=True)]

    def probability(tokens: Array) -> Array:
        below = np.full(len(tokens), 1 / vocab_size)
        for level, (context, gram) in zip(levels, look_up(orders, tokens, vocab_size=vocab_size), strict=True):
            own = np.where(gram >= 0, level.discounted[gram], 0.0) + level.left_over[context] * below
            below = np.where((context >= 0) & (level.totals[context] > 0), own, below)
        return below

    return probability


def _kept_counts(orders: list[Order]) -> list[Array]:
    """The highest order keeps its counts; below, an n-gram counts the distinct tokens that came before it."""
    counts = []
    for lower, higher in pairwise(orders):
        one_of_each = np.zeros(len(higher.keys), dtype=np.int64)
        there = higher.numbers >= 0
        one_of_each[higher.numbers[there]] = np.flatnonzero(there)  # any place where the (n+1)-gram ends
        counts.append(np.bincount(lower.numbers[one_of_each], minlength=len(lower.keys)))
    return [*counts, orders[-1].counts]


@dataclass(frozen=True)
class _Level:
    """One order of Kneser-Ney: p(token | context) = discounted + left_over(context) · p(token | shorter context)."""

    discounted: Array  # (distinct,) (count - discount) / total of the context
    left_over: Array  # (contexts,) what the discounts took, as a share
    totals: Array  # (contexts,)

    @classmethod
    def of(cls, order: Order, counts: Array, vocab_size: int) -> "_Level":
        context = order.keys // vocab_size
        taken = _discounts(counts)[np.minimum(counts, 3)]
        totals = np.bincount(context, weights=counts, minlength=order.contexts)
        left_over = np.bincount(context, weights=taken, minlength=order.contexts) / np.maximum(totals, 1)
        return cls((counts - taken) / np.maximum(totals[context], 1), left_over, totals)


def _discounts(counts: Array) -> Array:
    """Discounts for counts of 0, 1, 2 and 3 or more (Chen and Goodman 1999, equation 26), from counts of counts.

    Too small a text has no counts of some size; then the discount is a half, never more than the count.
    """
    n1, n2, n3, n4 = (float(np.count_nonzero(counts == size)) for size in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(found, 0.0, [0.0, 1.0, 2.0, 3.0])


_BASELINES: dict[str, tuple[int, Callable[..., Score]]] = {
    "unigram": (1, unigram),
    "trigram": (3, trigram),
    "kneser_ney_5": (5, kneser_ney),
}


def baselines(train: Array, *, vocab_size: int, names: Sequence[str]) -> Iterator[tuple[str, Score]]:
    """Counts the training tokens (n,) once and yields a name and its model, one after another."""
    highest = max((_BASELINES[name][0] for name in names), default=0)
    orders = count_orders(train, vocab_size=vocab_size, highest=highest)
    for name in names:
        order, make = _BASELINES[name]
        yield name, make(orders[:order], vocab_size=vocab_size)
