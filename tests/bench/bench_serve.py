# ruff: noqa: E402 (the threads and the path must be set before torch and `serving` are imported)
"""Output tokens a second: our engine against Transformers with the same weights, and our server against our engine.

Greedy answers of one length to prompts of mixed lengths, one thread for every contender, rounds interleaved so that
a busy machine is busy for all, and new random prompts each round so that no cache helps. Medians over the rounds.
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the server's process, and this one, read it at their start
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/unit/serving")]

import httpx
import torch
from tiny_packages import make_package
from transformers import AutoModelForCausalLM, PreTrainedModel

from serving.engine.engine import Engine
from serving.engine.messages import SamplingParams
from serving.settings import Settings

ROUNDS = 3
REQUESTS, ALONE, BATCH = 32, 6, 8  # `ALONE`: how many of the requests the slowest contender is timed on
NEW_TOKENS = 64
# About the size of the model that `make up` trains: 6.8 M parameters.
SHAPE = {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 768, "max_position_embeddings": 512,
}  # fmt: skip

Prompts = list[list[int]]


def random_prompts(generator: torch.Generator) -> Prompts:
    lengths = torch.randint(16, 256, (REQUESTS,), generator=generator).tolist()
    return [torch.randint(1, SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def generate(model: PreTrainedModel, prompts: Prompts, *, batch: int) -> None:
    """Transformers, in static batches padded on the left."""
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
        limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        made = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits)
        assert made.shape == (len(some), width + NEW_TOKENS)


def offline(engine: Engine, prompts: Prompts) -> None:
    engine.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True))


async def over_http(port: int, prompts: Prompts) -> None:
    """All requests at once, each a stream on a connection of its own, read by as little code as can be."""

    async def one(prompt: list[int]) -> None:
        body = json.dumps(
            {"model": "bench", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
             "stream": True, "stream_options": {"include_usage": True}}
        )  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write((head + body).encode())
        answer = await reader.read(-1)
        writer.close()
        assert f'"completion_tokens":{NEW_TOKENS}'.encode() in answer, answer[:500]
        assert b"data: [DONE]" in answer

    await asyncio.gather(*(one(prompt) for prompt in prompts))


def start_server(package: Path) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serving", str(package), "--served-name", "bench", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    for _ in range(600):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                return process, port
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise RuntimeError("the server did not become ready")


def tokens_per_s(work: Callable[[], None], requests: int) -> float:
    begin = time.perf_counter()
    work()
    return requests * NEW_TOKENS / (time.perf_counter() - begin)


def measure(package: Path, port: int) -> dict[str, list[float]]:
    engine = Engine.load(package, Settings(model=str(package)))
    reference = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    contenders: dict[str, tuple[int, Callable[[Prompts], None]]] = {
        "engine": (REQUESTS, lambda prompts: offline(engine, prompts)),
        "server": (REQUESTS, lambda prompts: asyncio.run(over_http(port, prompts))),
        "transformers, batches": (REQUESTS, lambda prompts: generate(reference, prompts, batch=BATCH)),
        "engine, alone": (1, lambda prompts: offline(engine, prompts)),
        "transformers, alone": (ALONE, lambda prompts: generate(reference, prompts, batch=1)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(ROUNDS + 1):
        for name, (requests, work) in contenders.items():
            prompts = random_prompts(generator)[:requests]
            rate = tokens_per_s(lambda work=work, prompts=prompts: work(prompts), requests)
            if round_number:  # the first one warms up
                rates[name].append(rate)
    return rates


def row(name: str, rates: dict[str, list[float]], ours: str, peer: str | None, goal: str) -> dict[str, object]:
    ratio = peer and statistics.median(a / b for a, b in zip(rates[ours], rates[peer], strict=True))
    peers = peer and statistics.median(rates[peer])
    unit = "output tokens/s"
    return {
        "name": name,
        "ours": statistics.median(rates[ours]),
        "peer": peers,
        "ratio": ratio,
        "goal": goal,
        "unit": unit,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        package = make_package(Path(folder) / "bench", **SHAPE)
        process, port = start_server(package)
        try:
            rates = measure(package, port)
        finally:
            process.terminate()
            process.wait()
    rows = [
        row("32 at once, beside Transformers one by one", rates, "engine", "transformers, alone", "≥ 3"),
        row("32 at once, beside Transformers in batches of 8", rates, "engine", "transformers, batches", "≥ 1.5"),
        row("one alone, beside Transformers", rates, "engine, alone", "transformers, alone", "≥ 1"),
        row("32 at once over HTTP, beside the engine offline", rates, "server", "engine", "≥ 0.9"),
    ]
    out = ROOT / "build/bench/serve.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
