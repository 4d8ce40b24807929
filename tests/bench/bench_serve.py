# ruff: noqa: E402 (the threads and the path must be set before torch and `serving` are imported)
"""Output tokens a second: our engine against Transformers with the same weights, and our server against our engine.

Greedy answers of one length to prompts of mixed lengths, one thread for every contender, rounds interleaved so that
a busy machine is busy for all, and new random prompts each round so that no cache helps. Medians over the rounds; where
a tenth is to be told apart, of as many more pairs whose order takes turns (the ratio of three pairs was 0.75 to 1.06).
Then what one user notices of another: how far a long prompt holds up the tokens of a stream that is running, and how
much sooner the first token comes where somebody has sent the same beginning before.
"""

import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the server's process, and this one, read it at their start
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/unit/serving")]

import httpx
import torch
from tiny_packages import make_package
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel

from serving.engine.engine import Engine
from serving.engine.messages import SamplingParams
from serving.settings import Settings

ROUNDS, PAIRS = 3, 15
REQUESTS, ALONE, BATCH = 32, 6, 8  # `ALONE`: how many of the requests the slowest contender is timed on
NEW_TOKENS = 64
# About the size of the model that `make up` trains: 6.8 M parameters.
SHAPE = {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 768, "max_position_embeddings": 2048,
}  # fmt: skip

PREFIX, TAIL, PREFIXES = 1000, 16, 5  # tokens that prompts share, and tokens of their own
LONG_PROMPT, LONG_PROMPTS, STREAMED = 1500, 3, 300

Prompts = list[list[int]]


class Beside(NamedTuple):
    gaps: list[float]  # seconds from token to token of the stream, shortest first
    first_token_s: float  # of the long prompts sent while it ran
    alone_s: float


def write_tokenizer(package: Path) -> None:
    """A word for each of the model's ids, so that each token is text at once, and an event of its own."""
    words = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, SHAPE["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(package / "tokenizer.json"))


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
    """All requests at once, each a stream on a connection of its own, read by as little code as can be.

    What the client takes of the machine counts against the server, though it is none of its own: the engine offline has no
    client, and here it is one more process on the same processors.
    """

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


async def token_times(http: httpx.AsyncClient, prompt: list[int], *, tokens: int) -> list[float]:
    """When each token of one streamed answer came, from the request on, in seconds."""
    body = {"model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    times, begin_s = [], time.perf_counter()
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter() - begin_s)
    assert len(times) == tokens, f"{len(times)} events for {tokens} tokens"
    return times


def tokens_of(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(1, SHAPE["vocab_size"], (count,), generator=generator).tolist()


def client(port: int) -> httpx.AsyncClient:
    """A user's, who keeps it: making one takes longer than a token does, and is no time of the server's."""
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None)


async def long_prompts_beside_a_stream(port: int, generator: torch.Generator) -> Beside:
    """One stream, while another user sends long prompts one after another; and such prompts with nobody beside them."""

    async def first_token_s() -> float:
        times = [await token_times(http, tokens_of(generator, LONG_PROMPT), tokens=1) for _ in range(LONG_PROMPTS)]
        return statistics.median(first for (first,) in times)

    async with client(port) as http:
        stream = asyncio.create_task(token_times(http, tokens_of(generator, 32), tokens=STREAMED))
        beside_s, times, alone_s = await first_token_s(), await stream, await first_token_s()
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Beside(sorted(gaps), beside_s, alone_s)


async def first_tokens(port: int, generator: torch.Generator) -> tuple[list[float], list[float]]:
    """Seconds to the first token of prompts whose beginning is new, and of others that begin alike."""
    cold, warm = [], []
    async with client(port) as http:
        await token_times(http, tokens_of(generator, TAIL), tokens=1)  # the connection is open
        for _ in range(PREFIXES):
            prefix = tokens_of(generator, PREFIX)
            for found in (cold, warm):
                found.append((await token_times(http, prefix + tokens_of(generator, TAIL), tokens=1))[0])
    return cold, warm


def between_users(port: int) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(1)
    rounds = [asyncio.run(long_prompts_beside_a_stream(port, generator)) for _ in range(ROUNDS)]
    stretches = [found.gaps[int(0.99 * len(found.gaps))] / statistics.median(found.gaps) for found in rounds]
    beside = sorted(zip(stretches, rounds, strict=True), key=lambda pair: pair[0])[ROUNDS // 2][1]
    cold, warm = map(statistics.median, asyncio.run(first_tokens(port, generator)))
    p99, median = beside.gaps[int(0.99 * len(beside.gaps))], statistics.median(beside.gaps)

    def row(name: str, ours: float, peer: float, goal: str, unit: str) -> dict[str, object]:
        ratio = ours / peer
        return {"name": name, "ours": ours * 1e3, "peer": peer * 1e3, "ratio": ratio, "goal": goal, "unit": unit}

    long = f"first token of {LONG_PROMPT}: beside a stream, and alone"
    return [
        row("a stream beside long prompts: 99th percentile and median", p99, median, "≤ 3", "ms a token"),
        row(long, beside.first_token_s, beside.alone_s, "≤ 3", "ms"),
        row(f"first token, {PREFIX} shared tokens: warm and cold", warm, cold, "≤ 0.2", "ms"),
    ]


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


def measure(engine: Engine, package: Path) -> dict[str, list[float]]:
    reference = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    contenders: dict[str, tuple[int, Callable[[Prompts], None]]] = {
        "engine": (REQUESTS, lambda prompts: offline(engine, prompts)),
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


def measure_http(engine: Engine, port: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(2)
    contenders: dict[str, Callable[[Prompts], None]] = {
        "engine": lambda prompts: offline(engine, prompts),
        "server": lambda prompts: asyncio.run(over_http(port, prompts)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(PAIRS + 1):
        prompts = random_prompts(generator)  # neither has the other's cache
        for name in sorted(contenders, reverse=bool(number % 2)):
            rate = tokens_per_s(partial(contenders[name], prompts), REQUESTS)
            if number:  # the first ones warm up
                rates[name].append(rate)
    return rates


def row(name: str, rates: dict[str, list[float]], ours: str, peer: str | None, goal: str) -> dict[str, object]:
    ratio = peer and statistics.median(a / b for a, b in zip(rates[ours], rates[peer], strict=True))
    peers = peer and statistics.median(rates[peer])
    own = statistics.median(rates[ours])
    return {"name": name, "ours": own, "peer": peers, "ratio": ratio, "goal": goal, "unit": "output tokens/s"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        package = make_package(Path(folder) / "bench", **SHAPE)
        write_tokenizer(package)
        process, port = start_server(package)
        try:
            engine = Engine.load(package, Settings(model=str(package)))
            rates, http_rates = measure(engine, package), measure_http(engine, port)
            others = between_users(port)
        finally:
            process.terminate()
            process.wait()
    rows = [
        row("32 at once, beside Transformers one by one", rates, "engine", "transformers, alone", "≥ 3"),
        row("32 at once, beside Transformers in batches of 8", rates, "engine", "transformers, batches", "≥ 1.5"),
        row("one alone, beside Transformers", rates, "engine, alone", "transformers, alone", "≥ 1"),
        row("32 at once over HTTP, beside the engine offline", http_rates, "server", "engine", "≥ 0.9"),
        *others,
    ]
    out = ROOT / "build/bench/serve.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
