"""The baselines are what they are called: proper distributions, equal to the textbook's sums on a small text."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.ngram import baselines, count_orders, kneser_ney

NAMES = ("unigram", "trigram", "kneser_ney_5")
VOCAB = 7


@given(
    train=st.lists(st.integers(0, VOCAB - 1), min_size=8, max_size=200),
    history=st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=8),
    name=st.sampled_from(NAMES),
)
@settings(max_examples=200, deadline=None)
def test_after_any_history_the_probabilities_add_up_to_one(train, history, name):
    [(_, score)] = baselines(np.array(train), vocab_size=VOCAB, names=[name])
    probabilities = [score(np.array([*history, token]))[-1] for token in range(VOCAB)]
    assert sum(probabilities) == pytest.approx(1)
    assert min(probabilities) > 0


@given(train=st.lists(st.integers(0, 3), min_size=6, max_size=100))
@settings(max_examples=100, deadline=None)
def test_counts_are_those_of_a_plain_counter(train):
    orders = count_orders(np.array(train), vocab_size=4, highest=4)
    for n, order in enumerate(orders, start=1):
        plain = collections.Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1))
        assert sorted(plain.values()) == sorted(order.counts.tolist())
        assert order.counts[order.numbers[n - 1 :]].tolist() == [
            plain[tuple(train[i : i + n])] for i in range(len(train) - n + 1)
        ]


def plain_kneser_ney(train: list[int], vocab: int, history: tuple[int, ...], token: int, n: int, top: bool) -> float:
    """Chen and Goodman's recursion with dictionaries, for the discounts that a small text falls back to (a half)."""
    if n == 0:
        return 1 / vocab
    grams = [tuple(train[i : i + n]) for i in range(len(train) - n + 1)]
    if top:
        counts = collections.Counter(grams)
    else:
        longer = {tuple(train[i : i + n + 1]) for i in range(len(train) - n)}
        counts = collections.Counter(gram[1:] for gram in longer)
    context = history[len(history) - (n - 1) :]
    follow = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context and count}
    below = plain_kneser_ney(train, vocab, history, token, n - 1, False)
    total = sum(follow.values())
    if not total:
        return below
    return max(follow.get(token, 0) - 0.5, 0) / total + 0.5 * len(follow) / total * below


def test_kneser_ney_equals_the_plain_recursion():
    train = [0, 1, 2, 0, 1, 3, 0, 1, 2, 4]
    score = kneser_ney(count_orders(np.array(train), vocab_size=5, highest=3), vocab_size=5)
    for history in [(0, 1), (1, 2), (3, 3), (4, 0)]:
        for token in range(5):
            wanted = plain_kneser_ney(train, 5, history, token, 3, True)
            assert score(np.array([*history, token]))[-1] == pytest.approx(wanted)


def test_longer_memories_predict_a_text_with_memory_better():
    pattern = np.random.default_rng(0).integers(0, 50, 400)
    noisy = np.tile(pattern, 12)
    rng = np.random.default_rng(1)
    noisy[rng.random(len(noisy)) < 0.1] = 7
    train, test = noisy[:4000], noisy[4000:]
    nats = [-np.log(score(test)).mean() for _, score in baselines(train, vocab_size=50, names=NAMES)]
    assert nats[0] > nats[1] > nats[2]
