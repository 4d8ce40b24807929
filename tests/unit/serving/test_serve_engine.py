"""Whatever shares the batch, the cache or the memory with a sequence, its answer is the same, and no block is lost."""

import itertools
import os
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_packages import make_package

from serving.engine import parts
from serving.engine.engine import Engine
from serving.engine.messages import Output, SamplingParams, Structure, TokenLogprob
from serving.engine.scheduler import Scheduled
from serving.engine.sequence import Sequence
from serving.engine.speculation import follow
from serving.errors import Refused
from serving.settings import Settings

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
KV_BYTES_PER_BLOCK = 16 * 2 * 2 * 2 * 16 * 4  # tokens · (k, v) · layers · heads · size · float32


def engine(
    root: Path, *, blocks: int = 64, max_num_seqs: int = 16, step_tokens: int = 512, speculate_tokens: int = 0
) -> Engine:
    kv_bytes = blocks * KV_BYTES_PER_BLOCK
    settings = Settings(
        model=str(root), kv_bytes=kv_bytes, max_num_seqs=max_num_seqs, speculate_tokens=speculate_tokens
    )
    made = Engine.load(root, settings)
    made.scheduler.max_step_tokens = step_tokens
    return made


def prompts(count: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 120, (count,), generator=g).tolist()
    return [torch.randint(1, 384, (n,), generator=g).tolist() for n in lengths]


def run(e: Engine) -> dict[int, list[Output]]:
    outputs: dict[int, list[Output]] = {}
    while e.has_work:
        for output in e.step():
            outputs.setdefault(output.seq_id, []).append(output)
    return outputs


@pytest.fixture(scope="module")
def alone(tiny: Path) -> list[str]:
    """Each prompt's greedy answer when it is the only one there ever was."""
    return [engine(tiny).generate([prompt], GREEDY)[0] for prompt in prompts(12)]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"step_tokens": 16},
        {"blocks": 17},
        {"blocks": 20, "step_tokens": 32},
        {"max_num_seqs": 3},
        {"max_num_seqs": 3, "speculate_tokens": 5},
    ],
    ids=["batched", "chunked", "preempted", "chunked-and-preempted", "few at a time", "speculating"],
)
def test_the_batch_never_changes_a_greedy_answer(tiny: Path, alone: list[str], limits: dict) -> None:
    e = engine(tiny, **limits)
    assert e.generate(prompts(12), GREEDY) == alone
    assert e.scheduler.blocks.used_ratio == 0.0


def test_a_cached_prefix_changes_nothing_but_the_work(tiny: Path, alone: list[str]) -> None:
    e = engine(tiny)
    longest = max(prompts(12), key=len)
    expected = alone[prompts(12).index(longest)]
    assert e.generate([longest], GREEDY) == [expected]
    e.add(0, longest, GREEDY, arrived_s=0.0)
    (first,) = e.scheduler.schedule()
    assert first.seq.num_computed == (len(longest) - 1) // 16 * 16 > 0
    e.abort(0)
    assert e.generate([longest] * 5, GREEDY) == [expected] * 5


def test_penalties_count_what_was_cached_preempted_or_guessed(tiny: Path) -> None:
    penalised = GREEDY._replace(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4)
    expected = [engine(tiny).generate([prompt], penalised)[0] for prompt in prompts(6)]
    assert expected != [engine(tiny).generate([prompt], GREEDY)[0] for prompt in prompts(6)]
    warm = engine(tiny)
    assert [warm.generate(prompts(6), penalised) for _ in range(2)] == [expected] * 2
    assert warm.counters.prefix_hit_tokens > 0
    crowded = engine(tiny, blocks=17, speculate_tokens=5)
    assert crowded.generate(prompts(6), penalised) == expected
    assert crowded.counters.preemptions > 0


def test_decoded_logits_equal_those_of_the_whole_sequence(tiny: Path) -> None:
    """Paged, token by token, against one pass with nothing cached: the logits themselves."""
    e = engine(tiny)
    ids = prompts(12)[3][:40] + prompts(12)[4][:20]

    def logits(seq: Sequence, num_tokens: int) -> torch.Tensor:
        seen = []
        original = e.runner.model.logits
        e.runner.model.logits = lambda x: seen.append(original(x)) or seen[-1]
        e.runner.run([Scheduled(seq, num_tokens)])
        e.runner.model.logits = original
        seq.num_computed += num_tokens
        return seen[-1][-1]

    def sequence(length: int) -> Sequence:
        seq = Sequence(0, ids[:length], GREEDY, decode=e.tokenizer.decode, arrived_s=0.0)
        assert e.scheduler.blocks.grow(seq, len(ids))
        return seq

    stepped = sequence(1)
    for length in range(1, len(ids) + 1):
        stepped.token_ids = ids[:length]
        by_step = logits(stepped, 1)
        if length % 10 == 0:
            whole = sequence(length)
            assert torch.allclose(by_step, logits(whole, length), atol=1e-4)
            e.scheduler.blocks.release(whole)


def test_sampling_is_reproducible_whatever_else_runs(tiny: Path) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, top_p=0.9, top_k=50, seed=11, ignore_eos=True)
    prompt = prompts(12)[2]
    expected = engine(tiny).generate([prompt], params)[0]
    crowded = engine(tiny, blocks=18, step_tokens=24)
    for index, other in enumerate(prompts(12)):
        crowded.add(index + 1, other, GREEDY._replace(temperature=0.7), arrived_s=0.0)
    crowded.add(0, prompt, params, arrived_s=0.0)
    assert "".join(output.text for output in run(crowded)[0]) == expected
    assert engine(tiny).generate([prompt], params._replace(seed=12))[0] != expected


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 90), st.integers(0, 40)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def crowded(tiny: Path) -> Engine:
    return engine(tiny, blocks=18, max_num_seqs=5, step_tokens=40)


@given(operations=OPERATIONS)
@settings(max_examples=30, deadline=None)
def test_no_block_is_lost_and_everyone_is_answered(crowded: Engine, operations: list[tuple[str, int, int]]) -> None:
    """Random arrivals, departures and steps in too little memory: what is not aborted ends, and all blocks come back."""
    e, outputs = crowded, {}
    wanted: dict[int, int] = {}
    blocks = e.scheduler.blocks
    seq_ids = itertools.count()
    for kind, number, more in operations:
        if kind == "add":
            seq_id = next(seq_ids)
            wanted[seq_id] = more
            # Half of the prompts begin alike, so that blocks are shared while they come and go.
            ids = [1 + i % 50 for i in range(number)] if more % 2 else [1 + (i * number) % 300 for i in range(number)]
            e.add(seq_id, ids, GREEDY._replace(max_tokens=more), arrived_s=time.monotonic())
        elif kind == "abort":
            e.abort(number)
            wanted.pop(number, None) if number not in outputs else None
        for _ in range(number if kind == "step" and e.has_work else 0):
            for output in e.step() if e.has_work else ():
                outputs[output.seq_id] = output
        owned = {block for seq in e.sequences.values() for block in seq.block_table}
        assert blocks.num_free + len(owned) == blocks.num_blocks
    while e.has_work:
        for output in e.step():
            outputs[output.seq_id] = output
    assert blocks.num_free == blocks.num_blocks
    assert not any(blocks._references)
    assert set(blocks._block_of.values()) == {b for b, key in enumerate(blocks._hash_of) if key is not None}
    for seq_id, output in outputs.items():
        if output.finish_reason:
            assert output.num_tokens == wanted.get(seq_id, output.num_tokens)


def test_preparing_a_structure_holds_up_nobody_else(tmp_path: Path, alone: list[str]) -> None:
    """Its tokenizer's file is a pipe here, so that preparing takes until somebody writes."""
    e = engine(make_package(tmp_path / "tiny"))
    file = tmp_path / "tiny" / "tokenizer.json"
    content = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    digits = GREEDY._replace(structure=Structure("regex", "[0-9]{3}"), ignore_eos=False)
    for seq_id, params in ((0, digits), (1, GREEDY), (2, digits._replace(structure=Structure("regex", "([")))):
        e.add(seq_id, prompts(12)[seq_id], params, arrived_s=0.0)
        if seq_id == 0:
            e.step()
            e.abort(0)
            e.add(3, prompts(12)[0], digits, arrived_s=0.0)
    text = ""
    while 1 in e.sequences:
        text += "".join(output.text for output in e.step() if output.seq_id == 1)
    assert text == alone[1]
    assert sorted(e.sequences) == [2, 3]
    file.write_bytes(content)
    outputs = run(e)
    assert outputs[2][-1].finish_reason == "error"
    assert re.fullmatch("[0-9]{3}", "".join(output.text for output in outputs[3]))
    assert e.scheduler.blocks.used_ratio == 0.0


def test_stop_strings_end_the_answer_and_take_their_logprobs_along(tiny: Path) -> None:
    e = engine(tiny)
    prompt = prompts(12)[5]
    whole = e.generate([prompt], GREEDY)[0]
    stop = whole[6:9]
    cut = whole[: whole.index(stop)]
    e.add(0, prompt, GREEDY._replace(stop=(stop, "never"), logprobs=2), arrived_s=0.0)
    outputs = run(e)[0]
    assert "".join(output.text for output in outputs) == cut
    assert outputs[-1].finish_reason == "stop"
    entries = [entry for output in outputs for entry in output.logprobs or ()]
    assert all(entry.offset < len(cut) for entry in entries)
    assert all(len(entry.top) == 2 and entry.top[0] == (entry.token_id, entry.logprob) for entry in entries)


def test_prompt_logprobs_are_those_of_one_whole_pass(tiny: Path) -> None:
    prompt = prompts(12)[6]
    params = GREEDY._replace(max_tokens=0, logprobs=1, prompt_logprobs=True)

    def report(step_tokens: int) -> list[TokenLogprob | None]:
        e = engine(tiny, step_tokens=step_tokens)
        e.generate([prompt], GREEDY)  # so that there is a cached prefix, which must not be used
        e.add(0, prompt, params, arrived_s=0.0)
        (output,) = run(e)[0]
        assert (output.finish_reason, output.num_tokens, output.text) == ("length", 0, "")
        assert output.prompt_logprobs is not None
        return output.prompt_logprobs

    whole, chunked = report(512), report(16)
    assert whole[0] is None
    assert [entry.token_id for entry in whole[1:] if entry] == prompt[1:]
    for one, other in zip(whole[1:], chunked[1:], strict=True):
        assert one is not None
        assert other is not None
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_memory_for_less_than_one_sequence_is_refused(tmp_path: Path) -> None:
    root = make_package(tmp_path / "p")
    with pytest.raises(Refused, match=r"--kv-bytes \d+"):
        Engine.load(root, Settings(model=str(root), kv_bytes=1000))
    for length, says in ((257, "at most 256"), (15, "at least 16")):
        with pytest.raises(Refused, match=says):
            Engine.load(root, Settings(model=str(root), max_model_len=length))
    Engine.load(root, Settings(model=str(root), max_model_len=16)).warm_up()


def test_memory_that_the_machine_does_not_have_is_refused(tiny: Path) -> None:
    """At load, and not when the last block is first written to, by when the kernel ends the process."""
    with pytest.raises(Refused, match="--kv-share"):
        Engine.load(tiny, Settings(model=str(tiny), kv_bytes=1 << 50))


def test_keys_and_values_have_their_share_of_the_free_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "available_bytes", lambda: 1000 * KV_BYTES_PER_BLOCK)
    blocks = {
        share: Engine.load(tiny, Settings(model=str(tiny), max_num_seqs=1, kv_share=share)).scheduler.blocks.num_blocks
        for share in (None, 0.25, 0.5)
    }
    assert blocks == {None: 256 // 16, 0.25: 250, 0.5: 500}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_guesses_save_steps_and_change_no_answer(tiny: Path, temperature: float) -> None:
    """A text that repeats itself: greedy answers of a random model soon do, and a biased draw does."""
    params = GREEDY._replace(max_tokens=120, temperature=temperature, seed=3, logit_bias=((7, 9.0), (8, 9.0)))
    prompt = [7, 8, 7, 7, 8, 8, 7, 8, 7, 7]

    def run_counting(speculate_tokens: int) -> tuple[str, int, float]:
        e = engine(tiny, speculate_tokens=speculate_tokens)
        e.add(0, prompt, params, arrived_s=0.0)
        chance, text, steps = e.sequences[0].rng, "", 0
        while e.has_work:
            text += "".join(output.text for output in e.step())
            steps += 1
        assert e.scheduler.blocks.used_ratio == 0.0
        return text, steps, chance.random()

    plain, guessed = run_counting(0), run_counting(6)
    assert (guessed[0], guessed[2]) == (plain[0], plain[2])
    assert guessed[1] < 0.8 * plain[1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 8))
def test_a_guess_is_what_followed_the_same_tokens_before(tokens: list[int], count: int) -> None:
    guess = follow(tokens, count)
    assert len(guess) <= count
    if guess:
        assert any(
            tokens[i - n : i] == tokens[-n:] and tokens[i : i + len(guess)] == guess
            for n in (2, 3, 4) for i in range(n, len(tokens))
        )  # fmt: skip
    else:
        assert all(tokens[i - 2 : i] != tokens[-2:] for i in range(2, len(tokens)))
