"""A model over two processes answers as it does in one; a rank that dies ends the server with one clear error."""

from pathlib import Path

import httpx
import psutil
import pytest
from conftest import Server
from tiny_adapters import write_adapter
from tiny_packages import make_package

from serving.engine.engine import Engine
from serving.errors import Refused
from serving.settings import Settings, parse

ASK = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 2}
PROMPTS = ["def main", "The quick brown fox jumps over", "x", "naïve café" * 8, "0123456789"]
# A bias on each matrix, and a vocabulary that two ranks do not share evenly.
SHAPE = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "vocab_size": 383}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    root = make_package(tmp_path_factory.mktemp("package") / "split", **SHAPE)
    weights, g = load_file(root / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in [name for name in weights if "proj" in name]:
        rows = len(weights[name])
        weights[name.replace(".weight", ".bias")] = torch.randn(rows, generator=g) * 0.3
    save_file(weights, root / "model.safetensors", metadata={"format": "pt"})
    return root


def answers(server: Server) -> list[dict]:
    """Of the model and of its adapter."""
    choices = []
    for name in ("split", "one"):
        made = server.http.post(server.url + "/v1/completions", json={"model": name, "prompt": PROMPTS, **ASK})
        assert made.status_code == 200, made.text
        choices += made.json()["choices"]
    return choices


def test_two_ranks_answer_as_one_and_die_together(package: Path, tmp_path: Path, start_server) -> None:
    write_adapter(tmp_path / "one", seed=4)
    adapters = ("--adapters-dir", str(tmp_path))
    alone = start_server(package, *adapters).wait_ready()
    expected = answers(alone)
    alone.process.kill()
    server = start_server(package, "--tensor-parallel-size", "2", *adapters).wait_ready()
    for one, other in zip(answers(server), expected, strict=True):
        assert one["text"] == other["text"]
        assert one["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-3)
    (engine,) = psutil.Process(server.process.pid).children()
    (rank,) = engine.children()
    rank.kill()
    assert server.wait() == 1
    (error,) = server.events("error")
    assert "rank 1 of 2 ended by itself (exit code -9)" in error["message"]
    assert "Traceback" not in server.log.read_text()
    assert not engine.is_running()


def test_no_rank_outlives_its_server(package: Path, start_server) -> None:
    server = start_server(package, "--tensor-parallel-size", "2", "--quantize", "int8").wait_ready()
    assert httpx.get(server.url + "/health/ready").status_code == 200
    processes = psutil.Process(server.process.pid).children(recursive=True)
    assert len(processes) == 2
    server.terminate()
    assert server.wait() == 0
    psutil.wait_procs(processes, timeout=30)
    assert not any(process.is_running() for process in processes)
    assert server.events("error") == []


def test_what_ranks_cannot_share_is_refused(package: Path) -> None:
    with pytest.raises(Refused, match=r"3 does not divide 2 key-value heads .*Give one of 1, 2$"):
        Engine.load(package, Settings(model=str(package), tensor_parallel_size=3))
    with pytest.raises(Refused, match=r"--kv-spill cannot be used with --tensor-parallel-size"):
        parse([str(package), "--tensor-parallel-size", "2", "--kv-spill", "1GiB"])
