"""A model over two processes answers as it does in one; a rank that dies ends the server with one clear error."""

from pathlib import Path

import httpx
import psutil
import pytest
from conftest import Server
from test_serve_lifecycle import refuse
from tiny_packages import make_package

from serving.errors import Refused
from serving.model.config import ModelConfig
from serving.model.shard import narrowed

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
    made = server.http.post(server.url + "/v1/completions", json={"model": "split", "prompt": PROMPTS, **ASK})
    assert made.status_code == 200, made.text
    return made.json()["choices"]


def test_two_ranks_answer_as_one_and_die_together(package: Path, start_server) -> None:
    alone = start_server(package).wait_ready()
    expected = answers(alone)
    alone.process.kill()
    server = start_server(package, "--tensor-parallel-size", "2").wait_ready()
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


def test_what_ranks_cannot_share_is_refused(package: Path, tmp_path: Path) -> None:
    assert "does not divide 2 key-value heads" in refuse(package, "--port", "0", "--tensor-parallel-size", "3")
    assert "--kv-spill" in refuse(package, "--tensor-parallel-size", "2", "--kv-spill", "1GiB")
    config = ModelConfig.read(package / "config.json")
    with pytest.raises(Refused, match=r"Give one of 1, 2$"):
        narrowed(config, 4, where="here")
