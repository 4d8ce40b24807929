"""`--engine onnx` answers as the torch engine does, over the same API; what a graph cannot do is refused."""

import shutil
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch
from conftest import Server
from tiny_packages import make_package

from serving.engine.engine import Engine
from serving.engine.messages import Output, SamplingParams
from serving.engine.model_runner import ModelRunner
from serving.errors import Refused
from serving.settings import Settings, parse

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def package(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny package with its graph, as the trainer exports it."""
    from trainer.onnx import export_onnx
    from trainer.package import load_package

    root = tmp_path_factory.mktemp("onnx") / "tiny"
    shutil.copytree(tiny, root)
    export_onnx(load_package(root), root / "model.onnx")
    return root


@pytest.fixture(scope="module")
def engines(package: Path) -> tuple[Engine, Engine]:
    def load(name: str) -> Engine:
        return Engine.load(package, Settings(model=str(package), engine=name, max_num_seqs=4))

    return load("torch"), load("onnx")


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(1, 384, (n,), generator=g).tolist() for n in (1, 2, 40, 7, 90, 150)]


def test_greedy_and_drawn_answers_are_those_of_torch(engines: tuple[Engine, Engine]) -> None:
    in_torch, in_onnx = engines
    drawn = GREEDY._replace(temperature=0.8, top_p=0.9, seed=5, presence_penalty=0.5)
    for params in (GREEDY, drawn):
        assert in_onnx.generate(prompts(), params) == in_torch.generate(prompts(), params)
    assert in_onnx.scheduler.blocks.used_ratio == 0.0
    # The second time prompts were found in the cache, up to their last block.
    assert in_onnx.counters.prefix_hit_tokens == sum((len(prompt) - 1) // 16 * 16 for prompt in prompts())


def test_a_token_costs_the_graph_a_token(package: Path, engines: tuple[Engine, Engine]) -> None:
    """Each position is computed once, however chunks cut it, whatever is guessed, and again when it is preempted."""
    longer = GREEDY._replace(max_tokens=40)
    long = prompts()[5]
    crowd = [long[start : start + 37] for start in range(0, 148, 37)]
    expected = engines[0].generate([long, *crowd], longer)
    settings = Settings(
        model=str(package),
        engine="onnx",
        kv_bytes=14 * 16 * 512,
        max_model_len=200,
        max_num_seqs=8,
        speculate_tokens=4,
    )
    e = Engine.load(package, settings)
    e.scheduler.max_step_tokens, sizes = 24, []
    model: Any = cast("ModelRunner", e.runner).model
    graph = model.session

    class Counting:
        def run(self, names: list[str], feeds: dict) -> list:
            sizes.append(feeds["input_ids"].size)
            return graph.run(names, feeds)

    model.session = Counting()
    assert e.generate([long], longer) == expected[:1]
    assert sum(sizes) <= 150 + 39 * (1 + 4)
    assert max(sizes) <= 24
    assert e.generate(crowd, longer) == expected[1:]
    assert e.counters.preemptions > 0


def test_logprobs_of_prompt_and_answer_are_those_of_torch(engines: tuple[Engine, Engine]) -> None:
    params = GREEDY._replace(max_tokens=3, logprobs=2, prompt_logprobs=True)

    def report(engine: Engine) -> list[float]:
        engine.add(0, prompts()[2], params, arrived_s=0.0)
        outputs: list[Output] = []
        while engine.has_work:
            outputs += engine.step()
        entries = [*(outputs[0].prompt_logprobs or ())[1:], *(e for output in outputs for e in output.logprobs or ())]
        assert len(entries) == len(prompts()[2]) - 1 + 3
        return [value for entry in entries if entry for value in (entry.logprob, *(v for _, v in entry.top))]

    assert report(engines[1]) == pytest.approx(report(engines[0]), abs=1e-4)


def test_the_api_is_the_same(package: Path, start_server) -> None:
    server: Server = start_server(package, "--engine", "onnx").wait_ready()
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        made = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=9, temperature=0,
            extra_body={"ignore_eos": True}, stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        assert [chunk.usage.completion_tokens for chunk in made if chunk.usage] == [9]
        with pytest.raises(openai.BadRequestError, match="no embeddings"):
            client.embeddings.create(model="tiny", input="x")


def test_what_a_graph_cannot_do_is_refused(package: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--quantize cannot be used with --engine onnx"):
        parse([str(package), "--engine", "onnx", "--quantize", "int8"])
    for root, says in ((tiny, "model.onnx is missing"), (tmp_path, "cannot be read")):
        if root == tmp_path:
            shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
            (tmp_path / "model.onnx").write_bytes(b"\x08no graph")
        with pytest.raises(Refused, match=says):
            Engine.load(root, Settings(model=str(root), engine="onnx"))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"num_hidden_layers": 3}, r"the graph has no 'past_key_values\.2\.key'"),
        ({"num_hidden_layers": 1}, r"the graph asks for 'past_key_values\.1\.key'"),
        ({"num_key_value_heads": 4}, r"'past_key_values\.0\.key' is tensor\(float\).* 2, .*not .* 4, "),
        ({"vocab_size": 400}, "'logits'"),
    ],
)
def test_a_graph_of_another_model_is_refused(package: Path, tmp_path: Path, shape: dict, says: str) -> None:
    root = make_package(tmp_path / "other", **shape)
    shutil.copy(package / "model.onnx", root)
    with pytest.raises(Refused, match=says):
        Engine.load(root, Settings(model=str(root), engine="onnx"))
