# ruff: noqa: E402 (the threads and the path must be set before torch and `serving` are imported)
"""A 100M Llama on a CPU, 32 greedy requests at once: our engine, Transformers and llama.cpp's server with the same weights.

Two threads for everyone; prompts of 16 to 512 and answers of 32 to 128 tokens, the same for all in a round, and new ones
each round so that no cache helps; rounds interleaved, so that a busy machine is busy for all. Transformers runs one by
one and in static batches of 8 (on some of the requests: its rate does not depend on how many wait) and, where it works,
by its own continuous batching. llama.cpp takes part when LLAMA_CPP names its source with `llama-server` built in
LLAMA_CPP_BIN (`cmake --build … --target llama-server`); its own script converts the package.
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
from typing import NamedTuple

THREADS = 2
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # before torch, which reads it at its start
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/unit/serving")]

import httpx
import torch
from tiny_packages import make_package
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from serving.engine.engine import Engine
from serving.engine.messages import SamplingParams
from serving.settings import Settings

ROUNDS = int(os.environ.get("ROUNDS", "3"))
REQUESTS, ALONE, BATCH = 32, 4, 8
SLOTS = (8, 16, 32)  # of llama.cpp's server: each is a contender of its own
MAX_LEN = 640
SHAPE = {
    "vocab_size": 32_000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "intermediate_size": 2048, "max_position_embeddings": 1024,
}  # fmt: skip


class Ask(NamedTuple):
    prompt: list[int]
    answer_tokens: int


Work = Callable[[list[Ask]], None]


def asks(generator: torch.Generator) -> list[Ask]:
    prompts = torch.randint(16, 513, (REQUESTS,), generator=generator).tolist()
    answers = torch.randint(32, 129, (REQUESTS,), generator=generator).tolist()
    return [
        Ask(torch.randint(1, SHAPE["vocab_size"], (p,), generator=generator).tolist(), a)
        for p, a in zip(prompts, answers, strict=True)
    ]


def ours(engine: Engine, some: list[Ask]) -> None:
    for index, ask in enumerate(some):
        params = SamplingParams(max_tokens=ask.answer_tokens, temperature=0.0, ignore_eos=True)
        engine.add(index, ask.prompt, params, arrived_s=0.0)
    while engine.has_work:
        engine.step()


def static_batches(model: PreTrainedModel, some: list[Ask], *, size: int) -> None:
    """Padded on the left, and run until the longest answer of the batch is done."""
    for start in range(0, len(some), size):
        part = some[start : start + size]
        width = max(len(ask.prompt) for ask in part)
        ids = torch.tensor([[0] * (width - len(ask.prompt)) + ask.prompt for ask in part])
        mask = torch.tensor([[0] * (width - len(ask.prompt)) + [1] * len(ask.prompt) for ask in part])
        longest = max(ask.answer_tokens for ask in part)
        model.generate(
            ids, attention_mask=mask, do_sample=False, pad_token_id=0, max_new_tokens=longest, min_new_tokens=longest
        )


def continuous(model: PreTrainedModel, some: list[Ask]) -> None:
    """Transformers' own continuous batching has one length for all answers: theirs is the mean, so the total is alike."""
    mean = round(statistics.mean(ask.answer_tokens for ask in some))
    config = GenerationConfig(max_new_tokens=mean, do_sample=False, eos_token_id=-1, pad_token_id=0)
    made = model.generate_batch(inputs=[ask.prompt for ask in some], generation_config=config, progress_bar=False)
    assert sum(len(output.generated_tokens) for output in made.values()) == mean * len(some)


def llama_cpp(port: int, some: list[Ask]) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None) as client:

            async def one(ask: Ask) -> None:
                body = {"prompt": ask.prompt, "n_predict": ask.answer_tokens, "temperature": 0, "ignore_eos": True}
                answer = (await client.post("/completion", json={**body, "cache_prompt": False})).json()
                assert answer["tokens_predicted"] == ask.answer_tokens, answer

            await asyncio.gather(*(one(ask) for ask in some))

    asyncio.run(run())


def convert(package: Path, dtype: str, source: Path) -> Path:
    """The package as GGUF, by llama.cpp's script, which is told that the test vocabulary is split as GPT-2's."""
    out = package / "model.gguf"
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import convert_hf_to_gguf as c\n"
        "from conversion.base import TextModel\nfrom conversion.llama import LlamaModel\n"
        "TextModel.get_vocab_base_pre = lambda *_: 'gpt-2'\n"
        "LlamaModel.set_vocab = TextModel._set_vocab_gpt2\n"
        "sys.argv[1:3] = []; c.main()\n"
    )
    paths = [str(source), str(source / "gguf-py")]
    words = [*paths, str(package), "--outfile", str(out), "--outtype", kind]
    subprocess.run([sys.executable, "-c", program, *words], check=True, capture_output=True)
    return out


def start_llama_cpp(gguf: Path, slots: int) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        os.environ["LLAMA_CPP_BIN"] + "/llama-server", "-m", str(gguf), "--port", str(port), "-t", str(THREADS),
        "-tb", str(THREADS), "-np", str(slots), "-c", str(slots * MAX_LEN), "--no-webui",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process, port
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"{' '.join(command)} did not become ready")


def rate(work: Work, some: list[Ask], *, prompts: bool) -> float:
    """Tokens a second: of the answers, or, with `prompts`, of the prompts of requests for one token."""
    if prompts:
        some = [Ask(ask.prompt, 1) for ask in some]
    begin = time.perf_counter()
    work(some)
    seconds = time.perf_counter() - begin
    return sum(len(ask.prompt) if prompts else ask.answer_tokens for ask in some) / seconds


def measure(package: Path, dtype: str, servers: dict[str, int]) -> dict[str, list[float]]:
    engine = Engine.load(package, Settings(model=str(package), dtype=dtype, max_model_len=MAX_LEN))
    reference = AutoModelForCausalLM.from_pretrained(package, dtype=getattr(torch, dtype)).eval()
    reference.generation_config.eos_token_id = None
    contenders: dict[str, tuple[int, Work]] = {
        "ours": (REQUESTS, lambda some: ours(engine, some)),
        "transformers, one by one": (ALONE, lambda some: static_batches(reference, some, size=1)),
        "transformers, batches": (BATCH, lambda some: static_batches(reference, some, size=BATCH)),
        **{name: (REQUESTS, lambda some, port=port: llama_cpp(port, some)) for name, port in servers.items()},
    }
    if os.environ.get("CONTINUOUS", "1") != "0":
        contenders["transformers, continuous"] = (REQUESTS, lambda some: continuous(reference, some))
    generator = torch.Generator().manual_seed(0)
    rates: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        work = asks(generator)
        for name, (count, run) in [*contenders.items()]:
            try:
                rates.setdefault(name, []).append(rate(run, work[:count], prompts=False))
                if name == "ours" or name in servers:
                    rates.setdefault(f"{name}: prompts", []).append(rate(run, asks(generator), prompts=True))
            except Exception as error:  # a contender that does not run here is told and left out
                print(f"{name} ({dtype}) failed: {type(error).__name__} {str(error)[:200]}", file=sys.stderr)
                del contenders[name]
                rates.pop(name, None)
            print(dtype, name, {k: [round(v) for v in r] for k, r in rates.items() if k.startswith(name)}, flush=True)
    return rates


def rows(dtype: str, rates: dict[str, list[float]]) -> list[dict[str, object]]:
    middle = {name: statistics.median(values) for name, values in rates.items()}

    def row(name: str, mine: str, peers: list[str], goal: str, unit: str) -> dict[str, object]:
        best = max((peer for peer in peers if peer in middle), key=lambda peer: middle[peer], default=None)
        ratio = best and statistics.median(a / b for a, b in zip(rates[mine], rates[best], strict=True))
        label = f"{dtype}: {name}" + (f" ({best})" if best else "")
        peer = best and middle[best]
        return {"name": label, "ours": middle[mine], "peer": peer, "ratio": ratio, "goal": goal, "unit": unit}

    transformers = [name for name in middle if name.startswith("transformers")]
    servers = [name for name in middle if name.startswith("llama.cpp") and ":" not in name]
    goal = "≥ 1" if dtype == "bfloat16" else "≥ 0.75"
    return [
        row("beside Transformers' best", "ours", transformers, "≥ 1.5", "output tokens/s"),
        row("beside llama.cpp's best", "ours", servers, goal, "output tokens/s"),
        row("prompts", "ours: prompts", [f"{name}: prompts" for name in servers], "≥ 0.8", "prompt tokens/s"),
    ]


def main() -> None:
    found: list[dict[str, object]] = []
    source = os.environ.get("LLAMA_CPP")
    for dtype in os.environ.get("DTYPES", "float32 bfloat16").split():
        with tempfile.TemporaryDirectory() as folder:
            package = make_package(Path(folder) / "bench", dtype=dtype, **SHAPE)
            processes: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
            try:
                gguf = convert(package, dtype, Path(source)) if source else None
                for slots in SLOTS if gguf else ():
                    processes[f"llama.cpp, {slots} slots"] = start_llama_cpp(gguf, slots)
                rates = measure(package, dtype, {name: port for name, (_, port) in processes.items()})
            finally:
                for process, _ in processes.values():
                    process.terminate()
                    process.wait()
        found += rows(dtype, rates)
    out = ROOT / "build/bench/serve_cpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
