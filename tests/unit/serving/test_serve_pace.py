"""Long prompts do not starve those who decode, nor those them; want of memory makes steps smaller, and ends nothing."""

import math
import random
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.engine import WARM_UP, WARM_UP_STEPS, Engine
from serving.engine.messages import SamplingParams
from serving.engine.pace import LEAST_TOKENS, Allowance, Pace, prompt_work
from serving.engine.scheduler import Scheduled
from serving.engine.sequence import Sequence
from serving.engine.usage import Peaks, Usage, Work
from serving.model.config import ModelConfig
from serving.model.llama import Linear, Llama
from serving.settings import Settings

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPTS = [[1 + (7 * i * n) % 380 for i in range(n)] for n in (20, 33, 50, 200, 180, 5)]


class Machine:
    """One that waits for its weights, or for its arithmetic where that takes longer, with a tenth of noise."""

    def __init__(self, *, weights_s: float, token_s: float, seed: int) -> None:
        self.weights_s, self.token_s, self.chance = weights_s, token_s, random.Random(seed)

    def seconds(self, *, decoding: int, prompt: float) -> float:
        each_s = max(self.weights_s, (decoding + prompt) * self.token_s)
        return 0.1 * self.weights_s + each_s + 0.2 * decoding * self.token_s

    def teach(self, pace: Pace, *, decoding: int, prompt: float) -> None:
        seconds = self.seconds(decoding=decoding, prompt=prompt) * self.chance.uniform(0.95, 1.05)
        pace.learn(decodes=decoding, prompt=prompt, seconds=seconds)

    def settled(self) -> Pace:
        """As the engine warms up."""
        pace = Pace(look=1e-3)
        for count, length in WARM_UP:
            self.teach(pace, decoding=0, prompt=count * length)
            for _ in range(WARM_UP_STEPS - 1):
                self.teach(pace, decoding=count, prompt=0)
        pace.settle()
        return pace


@settings(max_examples=50)
@given(
    weights_s=st.floats(1e-3, 1.0), tokens=st.floats(0.5, 60), before=st.integers(1, 64), decoding=st.integers(1, 64),
    alone=st.integers(2, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_chunk_stretches_a_step_to_less_than_three(
    weights_s: float, tokens: float, before: int, decoding: int, alone: int, seed: int
) -> None:
    """On machines of any speed, whatever was learnt from another load: from the first chunk on, and to good use."""
    machine = Machine(weights_s=weights_s, token_s=weights_s / tokens, seed=seed)
    pace = machine.settled()
    for _ in range(40):
        machine.teach(pace, decoding=before, prompt=0)
    for _ in range(alone):
        machine.teach(pace, decoding=decoding, prompt=0)
    only_decodes_s, stretches, works = machine.seconds(decoding=decoding, prompt=0), [], []
    for _ in range(60):
        works.append(pace.allowance(decoding=decoding, first_tokens=1, most=10**6).work)
        machine.teach(pace, decoding=decoding, prompt=works[-1])
        stretches.append(machine.seconds(decoding=decoding, prompt=works[-1]) / only_decodes_s)
    short = [stretch for stretch, work in zip(stretches, works, strict=True) if work > LEAST_TOKENS]
    assert sum(stretch > 3 for stretch in short) <= 1
    assert max(short, default=0) <= 3.5
    assert works[-1] < 1.25 * LEAST_TOKENS or statistics.median(stretches[30:]) >= 1.5


def test_an_engine_that_has_measured_nothing_takes_all() -> None:
    """It is a library's: nobody listens to its tokens one by one."""
    assert Pace(look=0.0).allowance(decoding=5, first_tokens=1, most=512).take(wanted=9999, computed=0) == 512


def test_the_many_come_first() -> None:
    pace = Machine(weights_s=0.02, token_s=0.001, seed=0).settled()

    def work(decoding: int, first_tokens: int) -> float:
        pace._longest = 1e6  # whatever the steps before had
        return pace.allowance(decoding=decoding, first_tokens=first_tokens, most=512).work

    assert work(4, 1) == work(4, 4) < work(4, 8) / 1.9
    assert work(0, 1) == math.inf


@given(
    work=st.floats(0, 1e4), tokens=st.integers(0, 2000), look=st.floats(0, 0.01), computed=st.integers(0, 10_000),
    wanted=st.lists(st.integers(1, 5000), min_size=1, max_size=5),
)  # fmt: skip
def test_no_more_is_taken_than_there_is(
    work: float, tokens: int, look: float, computed: int, wanted: list[int]
) -> None:
    there = Allowance(tokens, work, look)
    taken = [there.take(wanted=count, computed=computed) for count in wanted]
    assert sum(taken) <= tokens
    assert all(0 <= count <= most for count, most in zip(taken, wanted, strict=True))
    one = prompt_work(1, computed, look=look)
    assert sum(prompt_work(count, computed, look=look) for count in taken) <= max(work, 0) + one + 1e-6 * work
    if tokens and work >= 1:
        assert taken[0] >= 1
        further = prompt_work(taken[0] + 1, computed, look=look)
        assert taken[0] in (wanted[0], tokens) or further >= work * (1 - 1e-9)


def load(root: Path, **changes: object) -> Engine:
    return Engine.load(root, Settings(**{"model": str(root), "max_num_seqs": 8, **changes}))


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[str]:
    return [load(tiny).generate([prompt], GREEDY)[0] for prompt in PROMPTS]


def test_a_long_prompt_leaves_every_step_a_token_for_the_others(tiny: Path, expected: list[str]) -> None:
    e = load(tiny)
    machine = Machine(weights_s=0.005, token_s=0.001, seed=0)  # where the shortest chunk doubles a step
    e.scheduler.pace = pace = machine.settled()
    pace.learn = lambda **_: None
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
    assert steps >= 200 // LEAST_TOKENS
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
