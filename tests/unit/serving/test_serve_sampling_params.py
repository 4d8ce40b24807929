"""Penalties, biases, cuts, stop tokens, structure and embeddings do what their definitions say, alone and in a batch."""

import json
import re
from pathlib import Path

import pytest
import torch

from serving.engine.engine import Engine
from serving.engine.messages import Output, SamplingParams, Structure
from serving.engine.sampler import sample
from serving.engine.sequence import Sequence
from serving.settings import Settings

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
PLAIN = SamplingParams(max_tokens=40, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return Engine.load(tiny, Settings(model=str(tiny)))


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[Output]]:
    outputs: list[list[Output]] = [[] for _ in prompts]
    for index, (prompt, how) in enumerate(zip(prompts, params, strict=True)):
        engine.add(index, prompt, how, arrived_s=0.0)
    while engine.has_work:
        for output in engine.step():
            outputs[output.seq_id].append(output)
    return outputs


def sequence(answer: list[int], **params) -> Sequence:
    seq = Sequence(0, [5], SamplingParams(max_tokens=9, **params), decode=lambda _: "", arrived_s=0.0)
    seq.token_ids += answer
    return seq


def test_penalties_follow_their_formulas() -> None:
    """Greedy over one row each, where the penalty decides which token wins."""
    cases = [
        ({}, [], 0),
        ({"presence_penalty": 1.1}, [0], 1),  # 0.9 < 1.0
        ({"presence_penalty": 0.9}, [0, 0], 0),  # presence counts once: 1.1 > 1.0
        ({"frequency_penalty": 0.6}, [0], 0),  # 1.4 > 1.0
        ({"frequency_penalty": 0.6}, [0, 0], 1),  # 0.8 < 1.0
        ({"repetition_penalty": 2.5}, [0], 1),  # 2.0 / 2.5 = 0.8
        ({"logit_bias": ((4, 3.5),)}, [], 4),  # -1 + 3.5
        ({"logit_bias": ((0, -100.0), (1, -100.0))}, [], 2),
    ]
    seqs = [sequence(answer, temperature=0.0, **params) for params, answer, _ in cases]
    assert sample(LOGITS.expand(len(cases), -1), seqs) == [token for _, _, token in cases]


def test_a_repetition_penalty_makes_negative_logits_more_so() -> None:
    logits = torch.tensor([[-1.0, -1.5, -9.0]])
    seq = sequence([0], temperature=0.0, repetition_penalty=2.0)
    seq.token_ids = [2, 0]
    assert sample(logits, [seq]) == [1]  # -1 · 2 < -1.5


def test_min_p_keeps_tokens_near_the_likeliest_and_their_proportions() -> None:
    probs = torch.softmax(LOGITS, -1)
    expected = torch.where(probs >= 0.3 * probs[0], probs, 0)
    seq = sequence([], temperature=1.0, min_p=0.3, seed=3)
    drawn = torch.bincount(torch.tensor(sample(LOGITS.expand(8000, -1), [seq] * 8000)), minlength=6) / 8000
    assert torch.allclose(drawn, expected / expected.sum(), atol=0.02)


def test_a_row_that_asks_for_nothing_is_not_changed_by_its_neighbours() -> None:
    logits = LOGITS.expand(3, -1)
    plain = sequence([], temperature=1.0, seed=9)
    alone = sample(logits[:1], [sequence([], temperature=1.0, seed=9)])[0]
    biased = sequence([], temperature=1.0, seed=1, logit_bias=((3, 50.0),))
    penalised = sequence([0], temperature=1.0, seed=1, repetition_penalty=1.5, min_p=0.1)
    assert sample(logits, [biased, plain, penalised])[1] == alone


def test_a_stop_token_ends_the_answer_and_is_not_in_it(engine: Engine) -> None:
    greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    engine.add(0, [7, 8, 9], greedy, arrived_s=0.0)
    seq = engine.sequences[0]
    while engine.has_work:
        engine.step()
    ids = seq.token_ids[3:]
    end = next(i for i in range(1, 20) if ids[i] not in ids[:i])
    (outputs,) = run(engine, [[7, 8, 9]], [greedy._replace(stop_token_ids=(ids[end],))])
    assert (outputs[-1].finish_reason, outputs[-1].num_tokens) == ("stop", end + 1)
    assert "".join(output.text for output in outputs) == engine.tokenizer.decode(ids[:end])


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "ok": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
    "required": ["name", "ok", "n"],
    "additionalProperties": False,
}


def test_structured_answers_fit_their_structure_beside_free_ones(engine: Engine) -> None:
    """A random model, so that nothing but the mask can make the answers fit."""
    structures = [
        Structure("json_schema", json.dumps(SCHEMA)),
        Structure("regex", r"[a-f]{3}-\d{2}"),
        Structure("grammar", 'start: "yes" | "no" " "+ "way"'),
        None,
    ]
    params = [PLAIN._replace(structure=structure, max_tokens=200) for structure in structures for _ in range(3)]
    texts = ["".join(o.text for o in outputs) for outputs in run(engine, [[4, 5]] * 12, params)]
    for text in texts[:3]:
        value = json.loads(text)
        assert value["name"] in ("ann", "bob")
        assert value["n"] in (1, 22, 333)
    assert all(re.fullmatch(r"[a-f]{3}-\d{2}", text) for text in texts[3:6])
    assert all(re.fullmatch(r"yes|no +way", text) for text in texts[6:9])
    assert texts[9:] == ["".join(o.text for o in run(engine, [[4, 5]], [params[9]])[0])] * 3


@pytest.mark.parametrize(
    "structure",
    [
        Structure("json_schema", '{"type": "nothing"}'),
        Structure("json_schema", "[" * 5000),
        Structure("regex", "(unclosed"),
        Structure("grammar", "start: missing"),
    ],
    ids=["type", "deep", "regex", "grammar"],
)
def test_a_structure_that_cannot_be_used_is_told_and_harms_nobody(engine: Engine, structure: Structure) -> None:
    refused, other = run(engine, [[1], [2]], [PLAIN._replace(structure=structure), PLAIN])
    assert refused[-1].finish_reason == "error"
    assert refused[-1].text
    assert other[-1].finish_reason in ("stop", "length")
    assert engine.scheduler.blocks.used_ratio == 0.0


def test_an_embedding_is_a_unit_vector_that_the_batch_does_not_change(engine: Engine) -> None:
    embed = SamplingParams(max_tokens=0, embed=True)
    prompts = [[3, 4, 5], [3, 4, 6] * 20, [9]]
    together = [outputs[-1].embedding for outputs in run(engine, prompts, [embed] * 3)]
    assert together == [run(engine, [prompt], [embed])[0][-1].embedding for prompt in prompts]
    vectors = torch.tensor(together)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    assert len(vectors[0]) == engine.runner.model.config.hidden
