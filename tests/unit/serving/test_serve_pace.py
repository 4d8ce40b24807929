"""Long prompts do not starve those who decode, nor those them; want of memory makes steps smaller, and ends nothing."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.engine import Engine
from serving.engine.messages import SamplingParams
from serving.engine.pace import LEAST_TOKENS, Pace
from serving.engine.scheduler import Scheduled
from serving.engine.sequence import Sequence
from serving.engine.usage import Peaks, Usage, Work
from serving.model.config import ModelConfig
from serving.model.llama import Linear, Llama
from serving.settings import Settings

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPTS = [[1 + (7 * i * n) % 380 for i in range(n)] for n in (20, 33, 50, 200, 180, 5)]


@given(
    weights_s=st.floats(1e-3, 1.0), token_s=st.floats(1e-5, 1e-2), decoding=st.integers(1, 64), seed=st.integers(0, 99)
)
def test_a_chunk_stretches_a_step_to_less_than_three(
    weights_s: float, token_s: float, decoding: int, seed: int
) -> None:
    """On machines of any speed, measured with a tenth of noise: after a few steps of each kind the chunk is right."""
    chance, pace = random.Random(seed), Pace()

    def seconds(tokens: int) -> float:
        return max(weights_s, decoding * token_s) + tokens * token_s

    pace.learn(decodes=0, prompt_tokens=512, seconds=weights_s + 512 * token_s)
    for step in range(80):
        tokens = pace.prompt_tokens(decoding=decoding, first_tokens=1, most=4096) if step > 3 else 0
        pace.learn(decodes=decoding, prompt_tokens=tokens, seconds=seconds(tokens) * chance.uniform(0.95, 1.05))
    tokens = pace.prompt_tokens(decoding=decoding, first_tokens=1, most=4096)
    assert tokens in (LEAST_TOKENS, 4096) or seconds(tokens) <= 3 * seconds(0)
    assert tokens == 4096 or seconds(tokens) >= 1.6 * seconds(0)


def test_the_many_come_first() -> None:
    pace = Pace()
    assert pace.prompt_tokens(decoding=5, first_tokens=1, most=512) == 512  # nothing is known yet
    pace.learn(decodes=0, prompt_tokens=512, seconds=0.512)
    pace.learn(decodes=4, prompt_tokens=0, seconds=0.02)
    assert pace.prompt_tokens(decoding=4, first_tokens=3, most=512) == 25
    assert pace.prompt_tokens(decoding=4, first_tokens=5, most=512) == 512
    assert pace.prompt_tokens(decoding=0, first_tokens=1, most=512) == 512
    pace.learn(decodes=4, prompt_tokens=0, seconds=1e-4)
    assert pace.prompt_tokens(decoding=4, first_tokens=1, most=20) >= LEAST_TOKENS


def load(root: Path, **changes: object) -> Engine:
    return Engine.load(root, Settings(**{"model": str(root), "max_num_seqs": 8, **changes}))


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[str]:
    return [load(tiny).generate([prompt], GREEDY)[0] for prompt in PROMPTS]


def test_a_long_prompt_leaves_every_step_a_token_for_the_others(tiny: Path, expected: list[str]) -> None:
    e = load(tiny)
    e.scheduler.pace.learn = lambda **_: None  # the machine of this test: 16 tokens double a step
    e.scheduler.pace.decode_s, e.scheduler.pace.token_s = 0.01, 0.001
    texts = [""] * len(PROMPTS)
    for index, prompt in enumerate(PROMPTS[:3]):
        e.add(index, prompt, GREEDY, arrived_s=0.0)
    for output in (output for _ in range(4) for output in e.step()):
        texts[output.seq_id] += output.text
    e.add(3, PROMPTS[3], GREEDY, arrived_s=0.0)
    steps = 0
    while e.sequences[3].num_output == 0:
        outputs = e.step()
        assert {output.seq_id for output in outputs} >= {0, 1, 2} & e.sequences.keys()
        for output in outputs:
            texts[output.seq_id] += output.text
        steps += 1
    assert steps == -(-200 // LEAST_TOKENS)
    while e.has_work:
        for output in e.step():
            texts[output.seq_id] += output.text
    assert texts[:4] == expected[:4]


def test_want_of_memory_makes_the_batch_smaller_and_answers_the_same(tiny: Path, expected: list[str]) -> None:
    e = load(tiny, min_free_bytes=1 << 60)
    for index, prompt in enumerate(PROMPTS):
        e.add(index, prompt, GREEDY, arrived_s=0.0)
    texts = [""] * len(PROMPTS)
    while e.has_work:
        for output in e.step():
            texts[output.seq_id] += output.text
        assert len(e.scheduler.running) <= 1
    assert texts == expected


def test_what_a_step_costs_is_counted_as_the_model_is_made(tiny: Path) -> None:
    config = ModelConfig.read(tiny / "config.json")
    with torch.device("meta"):
        model = Llama(config)
    work = Work.of(config, form="float32", dtype=torch.float32)
    layers = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, Linear))
    assert (work.layer_weights, work.layer_bytes) == (layers, 4 * layers)
    assert work.head_weights == model.head.weight.numel()
    seq = Sequence(0, list(range(1, 11)), GREEDY, decode=lambda _: "", arrived_s=0.0)
    seq.num_computed = 9
    cost = work.cost([Scheduled(seq, 1)], 0.5)
    assert cost.flops == 2 * (layers + work.head_weights) + 10 * 4 * config.layers * config.heads * config.head_dim
    assert cost.read_bytes == 4 * layers + work.head_bytes + 10 * 2 * 2 * 2 * 16 * 4
    usage = Usage(work, Peaks(bytes_per_s=cost.read_bytes, flops_per_s=4 * cost.flops))
    assert usage.ratios == (0.0, 0.0)
    usage.add([Scheduled(seq, 1)], 0.5)
    assert usage.ratios == (2.0, 0.5)
