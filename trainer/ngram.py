"""Baselines that a language model has to beat: n-gram models over the same tokens, counted and scored with numpy.

Every distinct n-gram has a number. That of the n-gram that ends at position i is found from the number of the
(n-1)-gram that ends at i - 1 and the token at i, so that counting any order is one sort of 64-bit keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
_EM_ROUNDS = 20
_EM_SHARE = 0.1


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


def unigram(train: Array, *, vocab_size: int) -> Callable[[Array], Array]:
    """Add-one (Laplace) unigrams: a function from tokens (n,) to the probability of each (n,)."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    probabilities = counts / counts.sum()
    return lambda tokens: probabilities[tokens]


def trigram(train: Array, *, vocab_size: int) -> Callable[[Array], Array]:
    """Interpolated trigrams (Jelinek and Mercer 1980): a weighted mean of uniform, 1-, 2- and 3-gram frequencies.

    The weights are those that suit text the counts have not seen: EM on the last tenth of the training text, counting
    the rest. Where a context was never seen, its weight goes to the orders below.
    """
    cut = int(len(train) * (1 - _EM_SHARE))
    columns = _frequencies(count_orders(train[:cut], vocab_size=vocab_size, highest=3), train[cut:], vocab_size)
    weights = np.full(4, 0.25)
    for _ in range(_EM_ROUNDS):
        shares = weights * columns
        weights = (shares / shares.sum(1, keepdims=True)).mean(0)
    orders = count_orders(train, vocab_size=vocab_size, highest=3)

    def probability(tokens: Array) -> Array:
        seen = np.stack([np.ones(len(tokens), dtype=bool), *_contexts_seen(orders, tokens, vocab_size)], 1)
        return (_frequencies(orders, tokens, vocab_size) * weights).sum(1) / (seen * weights).sum(1)

    return probability


def _contexts_seen(orders: list[Order], tokens: Array, vocab_size: int) -> list[Array]:
    totals = [_context_totals(order, vocab_size) for order in orders]
    found = look_up(orders, tokens, vocab_size=vocab_size)
    return [(context >= 0) & (total[context] > 0) for total, (context, _) in zip(totals, found, strict=True)]


def _context_totals(order: Order, vocab_size: int) -> Array:
    return np.bincount(order.keys // vocab_size, weights=order.counts, minlength=order.contexts)


def _frequencies(orders: list[Order], tokens: Array, vocab_size: int) -> Array:
    """Relative frequencies, (n, 1 + orders): uniform first; 0 where the n-gram was not seen."""
    columns = [np.full(len(tokens), 1 / vocab_size)]
    for order, (context, gram) in zip(orders, look_up(orders, tokens, vocab_size=vocab_size), strict=True):
        totals = _context_totals(order, vocab_size)
        columns.append(np.where(gram >= 0, order.counts[gram] / np.maximum(totals[context], 1), 0.0))
    return np.stack(columns, 1)


def kneser_ney(train: Array, *, vocab_size: int, highest: int = 5) -> Callable[[Array], Array]:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3), with three discounts an order."""
    orders = count_orders(train, vocab_size=vocab_size, highest=highest)
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
    for lower, higher in zip(orders, orders[1:], strict=False):
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


BASELINES: dict[str, Callable[..., Callable[[Array], Array]]] = {
    "unigram": unigram,
    "trigram": trigram,
    "kneser_ney_5": kneser_ney,
}
