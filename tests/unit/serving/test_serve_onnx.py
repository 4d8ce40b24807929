"""`--engine onnx` answers as the torch engine does, over the same API; what a graph cannot do is refused."""

import shutil
from pathlib import Path

import openai
import pytest
import torch
from conftest import Server

from serving.engine.engine import Engine
from serving.engine.messages import Output, SamplingParams
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
    assert in_onnx.counters.prefix_hit_tokens == 0


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
