# ruff: noqa: E402 (the threads and the path must be set before torch and `serving` are imported)
"""A 100M Llama on a CPU, 32 greedy requests at once: our engine, Transformers and llama.cpp's server with the same weights.

Two threads for everyone; prompts of 16 to 512 and answers of 32 to 128 tokens, the same for all in a round, and new ones
each round so that no cache helps; rounds interleaved, so that a busy machine is busy for all. Rates are by the clock and,
since on a busy machine the clock says little, by the processor's time. Transformers runs one by one and in static batches
of 8 (on some of the requests: its rate does not depend on how many wait) and by its own continuous batching, llama.cpp
with several numbers of slots; from the second round on only the best of each. No round is begun that BUDGET_S seconds
do not suffice for. bfloat16 takes part (DTYPES) where the processor has products of it: elsewhere a peer would only convert.
llama.cpp takes part when LLAMA_CPP names its source with `llama-server` built in LLAMA_CPP_BIN
(`cmake --build … --target llama-server`); its own script converts the package.
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
import psutil
import torch
from tiny_packages import make_package
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from serving.engine.engine import Engine
from serving.engine.messages import SamplingParams
from serving.settings import Settings

ROUNDS, BUDGET_S = int(os.environ.get("ROUNDS", "3")), float(os.environ.get("BUDGET_S", "420"))
REQUESTS, ALONE, BATCH = 32, 2, 8
SLOTS = (8, 32)  # of llama.cpp's server: each is a contender of its own
MAX_LEN = 640
SHAPE = {
    "vocab_size": 32_000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "intermediate_size": 2048, "max_position_embeddings": 1024,
}  # fmt: skip


class Ask(NamedTuple):
    prompt: list[int]
    answer_tokens: int


class Contender(NamedTuple):
    name: str
    family: str
    requests: int
    work: Callable[[list[Ask]], None]
    process: psutil.Process = psutil.Process()


class Rate(NamedTuple):
    """Tokens a second, by the clock and by the processor's time."""

    clock: float
    cpu: float


Rates = dict[str, list[Rate]]


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


def rate(contender: Contender, some: list[Ask], *, prompts: bool) -> Rate:
    """Of the answers' tokens, or, with `prompts`, of the prompts' of requests for one token."""
    if prompts:
        some = [Ask(ask.prompt, 1) for ask in some]
    tokens = sum(len(ask.prompt) if prompts else ask.answer_tokens for ask in some)
    begin_s, begin_cpu_s = time.perf_counter(), cpu_s(contender.process)
    contender.work(some)
    return Rate(tokens / (time.perf_counter() - begin_s), tokens / (cpu_s(contender.process) - begin_cpu_s))


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def measure(
    package: Path, dtype: str, servers: dict[int, tuple[subprocess.Popen[bytes], int]], *, budget_s: float
) -> dict[str, Rates]:
    """Each family's contenders, with their rates in the rounds; `… prompts` for those of the prompts."""
    engine = Engine.load(package, Settings(model=str(package), dtype=dtype, max_model_len=MAX_LEN))
    reference = AutoModelForCausalLM.from_pretrained(package, dtype=getattr(torch, dtype)).eval()
    reference.generation_config.eos_token_id = None
    contenders = [
        Contender("ours", "ours", REQUESTS, lambda some: ours(engine, some)),
        Contender("one by one", "Transformers", ALONE, lambda some: static_batches(reference, some, size=1)),
        Contender("batches of 8", "Transformers", BATCH, lambda some: static_batches(reference, some, size=BATCH)),
        Contender("continuous", "Transformers", REQUESTS, lambda some: continuous(reference, some)),
    ]
    for slots, (process, port) in servers.items():
        work = lambda some, port=port: llama_cpp(port, some)  # noqa: E731
        contenders.append(Contender(f"{slots} slots", "llama.cpp", REQUESTS, work, psutil.Process(process.pid)))
    ours(engine, asks(torch.Generator().manual_seed(1))[:1])  # memory is touched, code is loaded
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Rates] = {}
    begin_s = time.perf_counter()
    for round_number in range(1, ROUNDS + 1):
        some, others = asks(generator), asks(generator)
        for contender in [*contenders]:
            try:
                answers = rate(contender, some[: contender.requests], prompts=False)
                found.setdefault(contender.family, {}).setdefault(contender.name, []).append(answers)
                if contender.family != "Transformers":
                    prompts = rate(contender, others, prompts=True)
                    found.setdefault(f"{contender.family} prompts", {}).setdefault(contender.name, []).append(prompts)
            except Exception as error:  # a contender that does not run here is told and left out
                print(f"{contender.name} ({dtype}) failed: {type(error).__name__} {str(error)[:200]}", file=sys.stderr)
                contenders.remove(contender)
                continue
            print(dtype, round_number, contender.family, contender.name, *(f"{r:.0f}" for r in answers), flush=True)
        contenders = [c for c in contenders if c.name == best(found[c.family])]
        if (time.perf_counter() - begin_s) * (round_number + 1) / round_number > budget_s:
            break
    return found


def best(rates: Rates) -> str:
    return max(rates, key=lambda name: statistics.median(rate.clock for rate in rates[name]))


def rows(dtype: str, found: dict[str, Rates]) -> list[dict[str, object]]:
    def row(mine: str, peer: str, goal: str, unit: str, *, by: str) -> dict[str, object]:
        name, own = best(found[peer]), [getattr(rate, by) for rate in found[mine]["ours"]]
        others = [getattr(rate, by) for rate in found[peer][name]]
        # Who is best with prompts need not be who is best with answers, and then it ran in the first round only.
        ratio = statistics.median(a / b for a, b in zip(own, others, strict=False))
        label = f"{dtype}: beside {peer} ({name})"
        values = {"ours": statistics.median(own), "peer": statistics.median(others), "ratio": ratio}
        return {"name": label, **values, "goal": goal, "unit": unit.format("s" if by == "clock" else "CPU second")}

    asked = [
        ("ours", "Transformers", "≥ 1.5", "output tokens/{}"),
        ("ours", "llama.cpp", "≥ 1" if dtype == "bfloat16" else "≥ 0.75", "output tokens/{}"),
        ("ours prompts", "llama.cpp prompts", "≥ 0.8", "prompt tokens/{}"),
    ]
    return [row(*words, by=by) for words in asked if words[1] in found for by in ("clock", "cpu")]


def main() -> None:
    found: list[dict[str, object]] = []
    source = os.environ.get("LLAMA_CPP")
    has_products = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    dtypes = os.environ.get("DTYPES") or ("float32 bfloat16" if has_products else "float32")
    for dtype in dtypes.split():
        with tempfile.TemporaryDirectory() as folder:
            package = make_package(Path(folder) / "bench", dtype=dtype, **SHAPE)
            servers: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
            try:
                gguf = convert(package, dtype, Path(source)) if source else None
                for slots in SLOTS if gguf else ():
                    servers[slots] = start_llama_cpp(gguf, slots)
                found += rows(dtype, measure(package, dtype, servers, budget_s=BUDGET_S / len(dtypes.split())))
            finally:
                for process, _ in servers.values():
                    process.terminate()
                    process.wait()
    out = ROOT / "build/bench/serve_cpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
