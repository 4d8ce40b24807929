"""A request's adapter gives the answers of the model that PEFT merges it into, whatever other adapters share its batch."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import make_adapter, write_adapter
from tiny_packages import make_package

from serving.engine import parts
from serving.engine.engine import Engine
from serving.engine.messages import AdapterRef, Output, SamplingParams
from serving.errors import Refused
from serving.model.adapter import read_adapter
from serving.model.config import ModelConfig
from serving.settings import Settings

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
KINDS = {
    "all": {},
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 4},
    "patterns": {"use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
}


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[AdapterRef, Path]]:
    """Each kind's adapter, and the package that PEFT merges it into."""
    root = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (name, changes) in enumerate(KINDS.items()):
        merged = root / f"{name}-merged"
        made[name] = (ref_of(tiny, make_adapter(tiny, root / name, seed=seed, merged=merged, **changes)), merged)
    return made


def ref_of(package: Path, root: Path) -> AdapterRef:
    file = read_adapter(root, ModelConfig.read(package / "config.json"))
    return AdapterRef(file.digest, root, file.num_values)


def engine(root: Path, **changes: object) -> Engine:
    return Engine.load(root, Settings(**{"model": str(root), "max_num_seqs": 16, **changes}))


def prompts(count: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(7)
    return [torch.randint(1, 384, (n,), generator=g).tolist() for n in torch.randint(1, 90, (count,), generator=g)]


@pytest.fixture(scope="module")
def expected(tiny: Path, adapters: dict[str, tuple[AdapterRef, Path]]) -> Callable[[AdapterRef | None, int], str]:
    """The merged model's answer to the i-th prompt, or the model's own."""
    answers = {ref: engine(merged).generate(prompts(8), GREEDY) for ref, merged in adapters.values()}
    answers[None] = engine(tiny).generate(prompts(8), GREEDY)
    assert len({tuple(of) for of in answers.values()}) == 4
    return lambda ref, index: answers[ref][index]


@pytest.mark.parametrize("max_adapters", [8, 1])
def test_a_mixed_batch_answers_as_the_merged_models_do(
    tiny: Path, adapters: dict[str, tuple[AdapterRef, Path]], expected: Callable, max_adapters: int
) -> None:
    """Every prompt by every adapter and by none, all at once: also where only one adapter at a time has a place."""
    e = engine(tiny, max_adapters=max_adapters)
    e.scheduler.max_step_tokens = 48
    work = [(ref, index) for index in range(8) for ref in (None, *(ref for ref, _ in adapters.values()))]
    answers = e.generate([prompts(8)[i] for _, i in work], GREEDY, adapters=[ref for ref, _ in work])
    assert answers == [expected(ref, i) for ref, i in work]
    assert len(e.adapters) <= max_adapters
    assert (e.counters.adapter_evictions > 0) == (max_adapters == 1)
    assert e.scheduler.blocks.used_ratio == 0.0


@pytest.mark.parametrize("settings", [{"quantize": "int8"}, {"dtype": "bfloat16"}])
def test_adapters_change_other_forms_of_weights_too(
    tiny: Path, adapters: dict[str, tuple[AdapterRef, Path]], settings: dict
) -> None:
    e = engine(tiny, **settings)
    (plain,) = e.generate(prompts(1), GREEDY)
    (adapted,) = e.generate(prompts(1), GREEDY, adapters=[adapters["all"][0]])
    assert adapted != plain
    assert e.generate(prompts(1), GREEDY) == [plain]


def test_a_prefix_is_shared_by_those_who_have_the_same_adapter(
    tiny: Path, adapters: dict[str, tuple[AdapterRef, Path]], expected: Callable
) -> None:
    e = engine(tiny)
    longest = max(range(8), key=lambda i: len(prompts(8)[i]))
    one, other = adapters["all"][0], adapters["attention"][0]

    def cached_tokens(ref: AdapterRef | None) -> int:
        e.add(0, prompts(8)[longest], GREEDY, arrived_s=0.0, adapter=ref)
        outputs = []
        while e.has_work:
            outputs += e.step()
        assert "".join(output.text for output in outputs) == expected(ref, longest)
        return outputs[0].cached_tokens

    assert [cached_tokens(ref) for ref in (None, one, other)] == [0, 0, 0]
    whole_blocks = (len(prompts(8)[longest]) - 1) // 16 * 16
    assert [cached_tokens(ref) for ref in (other, one, None)] == [whole_blocks] * 3


def test_an_adapter_that_changed_on_disk_fails_its_requests_and_no_others(
    tiny: Path, adapters: dict[str, tuple[AdapterRef, Path]], tmp_path: Path
) -> None:
    e = engine(tiny)
    ref = ref_of(tiny, write_adapter(tmp_path / "a", seed=9))
    weights = load_file(ref.root / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, ref.root / "adapter_model.safetensors")
    e.add(0, [1, 2, 3], GREEDY, arrived_s=0.0, adapter=ref)
    e.add(1, [1, 2, 3], GREEDY, arrived_s=0.0)
    outputs = []
    while e.has_work:
        outputs += e.step()
    (failed,) = [output for output in outputs if output.seq_id == 0]
    assert failed.finish_reason == "failed"
    assert "changed on disk" in failed.text
    assert outputs[-1].num_tokens == GREEDY.max_tokens
    assert e.scheduler.blocks.used_ratio == 0.0


@pytest.mark.parametrize("compiled", [True, False])
def test_an_adapter_that_overflows_spoils_no_answer_but_its_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """The others have the blocks after it, whose ends hold what it left. With values that are none it is not taken."""
    if not compiled:
        monkeypatch.setattr(parts, "_kernels", lambda *_: None)
    expected = engine(tiny).generate(prompts(8), GREEDY)
    e, root = engine(tiny, kv_bytes=45 * 8192), write_adapter(tmp_path / "a", seed=9)  # 45 blocks
    weights = load_file(root / "adapter_model.safetensors")
    for factor, says in ((1e25, ""), (torch.inf, "no numbers")):
        save_file({name: factor * tensor for name, tensor in weights.items()}, root / "adapter_model.safetensors")
        for seq_id in range(3):
            e.add(seq_id, [1 + seq_id] * 200, GREEDY, arrived_s=0.0, adapter=ref_of(tiny, root))
        ends = []
        while e.has_work:
            ends += [output for output in e.step() if output.finish_reason]
        assert [says in output.text for output in ends] == [True] * 3
        assert {output.finish_reason for output in ends} == {"failed" if says else "length"}
        assert e.generate(prompts(8), GREEDY) == expected


class SlowDisk:
    """An adapter whose config is a pipe: who reads it waits until somebody writes."""

    def __init__(self, package: Path, root: Path, *, seed: int) -> None:
        self.ref = ref_of(package, write_adapter(root, seed=seed))
        self._config = root / "adapter_config.json"
        self.content = self._config.read_bytes()
        self._config.unlink()
        os.mkfifo(self._config)

    def answers(self, content: bytes) -> None:
        self._config.write_bytes(content)  # returns once it is read


def run(e: Engine, *, steps: int = 10**6) -> dict[int, list[Output]]:
    """The outputs of so many steps, or of all, by sequence."""
    outputs: dict[int, list[Output]] = defaultdict(list)
    while e.has_work and steps:
        steps -= 1
        for output in e.step():
            outputs[output.seq_id].append(output)
    return outputs


def test_a_slow_disk_holds_up_nobody_but_those_who_wait_for_it(
    tiny: Path, adapters: dict[str, tuple[AdapterRef, Path]], expected: Callable, tmp_path: Path
) -> None:
    slow = SlowDisk(tiny, tmp_path / "slow", seed=9)
    e, (quick, _) = engine(tiny, max_adapters=2), adapters["all"]
    e.add(0, prompts(8)[0], GREEDY, arrived_s=0.0, adapter=slow.ref)  # the first of all, and for long
    e.add(1, prompts(8)[1], GREEDY, arrived_s=time.monotonic())
    e.add(2, prompts(8)[2], GREEDY, arrived_s=time.monotonic(), adapter=quick)
    others = defaultdict(list)
    while {1, 2} & e.sequences.keys():
        for seq_id, outputs in run(e, steps=1).items():
            others[seq_id] += outputs
    assert ["".join(o.text for o in others[i]) for i in (1, 2)] == [expected(None, 1), expected(quick, 2)]
    assert 0 not in others
    slow.answers(slow.content)
    (answer,) = run(e).values()
    twin = ref_of(tiny, write_adapter(tmp_path / "twin", seed=9))
    assert ["".join(output.text for output in answer)] == engine(tiny).generate(prompts(8)[:1], GREEDY, adapters=[twin])


def test_a_disk_that_never_answers_keeps_its_place_and_no_more(
    tiny: Path, adapters: dict[str, tuple[AdapterRef, Path]], expected: Callable, tmp_path: Path
) -> None:
    """With one place in all: those without an adapter go on however long it takes; once it fails, the next has it."""
    slow = SlowDisk(tiny, tmp_path / "slow", seed=9)
    e, (quick, _) = engine(tiny, max_adapters=1), adapters["all"]
    for seq_id, ref in enumerate((slow.ref, quick, None)):
        e.add(seq_id, prompts(8)[seq_id], GREEDY, arrived_s=0.0, adapter=ref)
    while 2 in e.sequences:
        e.step()
    assert sorted(e.sequences) == [0, 1]
    slow.answers(b"{}")
    outputs = run(e)
    (failed,) = outputs[0]
    assert (failed.finish_reason, "cannot be read" in failed.text) == ("failed", True)
    assert "".join(output.text for output in outputs[1]) == expected(quick, 1)
    assert len(e.adapters) == 1
    assert e.scheduler.blocks.used_ratio == 0.0


def test_too_large_an_adapter_is_told_the_bytes_that_it_needs(
    tiny: Path, adapters: dict[str, tuple[AdapterRef, Path]]
) -> None:
    ref = adapters["all"][0]
    e = engine(tiny, adapter_bytes=ref.num_values * 4 - 1)
    e.add(0, [1, 2, 3], GREEDY, arrived_s=0.0, adapter=ref)
    (output,) = e.step()
    assert f"--adapter-bytes {ref.num_values * 4}" in output.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_what_would_be_left_out_is_refused(
    tiny: Path, adapters: dict[str, tuple[AdapterRef, Path]], tmp_path: Path, change: dict, says: str
) -> None:
    source = adapters["all"][0].root
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    about = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(Refused, match=says):
        ref_of(tiny, tmp_path)


def test_an_adapter_of_another_model_or_a_damaged_one_is_refused(
    tiny: Path, adapters: dict[str, tuple[AdapterRef, Path]], tmp_path: Path
) -> None:
    source = adapters["all"][0].root
    with pytest.raises(Refused, match=r"the model has 1 layers, and \w+_proj is"):
        ref_of(make_package(tmp_path / "other", num_hidden_layers=1), source)
    with pytest.raises(Refused, match=r"adapter_config\.json is missing"):
        ref_of(tiny, tmp_path)
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    with pytest.raises(Refused, match="cannot be read"):
        ref_of(tiny, tmp_path)
    weights = load_file(source / "adapter_model.safetensors")
    whole = (source / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match="damaged"):
        ref_of(tiny, tmp_path)
    some = dict(list(weights.items())[1:])
    save_file(some, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Refused, match=r"pairs|matrices"):
        ref_of(tiny, tmp_path)
    save_file(
        {**weights, "base_model.model.lm_head.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(Refused, match="no place"):
        ref_of(tiny, tmp_path)
