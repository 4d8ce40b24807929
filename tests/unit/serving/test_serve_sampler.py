"""Sampling draws from the distribution that the parameters describe."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.messages import SamplingParams
from serving.engine.sampler import logprobs, sample
from serving.engine.sequence import Sequence

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf])


def sequence(**params) -> Sequence:
    return Sequence(0, [1], SamplingParams(max_tokens=1, **params), decode=lambda _: "", arrived_s=0.0)


def shares(count: int = 8000, **params) -> torch.Tensor:
    seq = sequence(seed=3, **params)
    tokens = sample(LOGITS.expand(count, -1), [seq] * count)
    return torch.bincount(torch.tensor(tokens), minlength=6) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, -1)
    assert torch.allclose(shares(temperature=temperature), expected, atol=0.02)


def test_top_k_and_top_p_keep_the_most_likely_and_their_proportions() -> None:
    probs = torch.softmax(LOGITS, -1)
    for params, kept in (
        ({"top_k": 2}, 2),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.01}, 1),
        ({"top_k": 3, "top_p": 0.99}, 3),
    ):
        expected = torch.where(torch.arange(6) < kept, probs, 0)
        assert torch.allclose(shares(temperature=1.0, **params), expected / expected.sum(), atol=0.02)


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0]), st.floats(0.01, 1.0), st.integers(0, 9), st.integers(0, 2**32)
        ),
        min_size=1,
        max_size=8,
    )
)
def test_a_row_is_sampled_alike_alone_and_in_any_batch(rows: list[tuple[float, float, int, int]]) -> None:
    logits = torch.randn(len(rows), 40, generator=torch.Generator().manual_seed(len(rows))) * 5

    def sequences() -> list[Sequence]:
        return [sequence(temperature=t, top_p=p, top_k=k, seed=s) for t, p, k, s in rows]

    together = sample(logits, sequences())
    alone = [sample(logits[i : i + 1], [seq])[0] for i, seq in enumerate(sequences())]
    assert together == alone
    for (temperature, _, top_k, _), token, row in zip(rows, together, logits, strict=True):
        rank = int((row > row[token]).sum())
        assert rank == 0 if temperature <= 1e-6 else rank < (top_k or 40)


BOUNDS = {
    "temperature": (0.0, 5e-324, 1e-40, 1e-6, 2.0), "top_p": (5e-324, 1e-9, 1.0), "top_k": (0, 1, 2**31),
    "min_p": (0.0, 5e-324, 1.0), "repetition_penalty": (5e-324, 1e-40, 1e-20, 1.0, 2.0),
    "presence_penalty": (-2.0, 0.0, 2.0), "frequency_penalty": (-2.0, 0.0, 2.0),
    "logit_bias": ((), ((1, 100.0), (2, -100.0))),
}  # fmt: skip


@given(rows=st.lists(st.fixed_dictionaries({k: st.sampled_from(v) for k, v in BOUNDS.items()}), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_whatever_is_asked_for_a_token_of_the_vocabulary_is_drawn(rows: list[dict]) -> None:
    """At the bounds of what a request may say, and beside a row whose model has overflowed."""
    g = torch.Generator().manual_seed(0)
    broken = torch.full((1, 6), torch.nan)
    logits = torch.cat((torch.randn(len(rows), 6, generator=g) * 30, broken, broken))

    def sequences() -> list[Sequence]:
        made = [sequence(seed=1, **row) for row in [*rows, {}, {"top_p": 0.5}]]
        for seq in made:
            seq.token_ids += [0, 1, 1, 2, 3, 4, 5]
        return made

    together = sample(logits, sequences())
    assert all(0 <= token < 6 for token in together)
    assert together == [sample(logits[i : i + 1], [seq])[0] for i, seq in enumerate(sequences())]


def test_so_little_temperature_that_it_is_none_leaves_nothing_to_chance() -> None:
    assert shares(count=50, temperature=5e-324)[0] == 1


def test_an_impossible_token_is_never_drawn() -> None:
    assert shares(temperature=2.0)[5] == 0


def test_logprobs_are_the_models_own_and_sorted() -> None:
    (entry,) = logprobs(LOGITS[None], [2], top=3, offsets=[7])
    table = torch.log_softmax(LOGITS, -1)
    assert (entry.token_id, entry.offset) == (2, 7)
    assert entry.logprob == pytest.approx(float(table[2]))
    assert [i for i, _ in entry.top] == [0, 1, 2]
    assert [v for _, v in entry.top] == pytest.approx(table[:3].tolist())
