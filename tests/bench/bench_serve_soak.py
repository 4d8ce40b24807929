# ruff: noqa: E402 (the path must be set before the tests' helpers are imported)
"""Does a server grow? Mixed traffic for a while (`SOAK_S` seconds, 60 when not given; an hour is 3600): whole answers and
streams, clients that leave, refusals, adapters that take turns in memory, structures, embeddings; prompts that share
prefixes and prompts that share nothing. Memory of server and engine at the end, beside that after the first third.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/unit/serving")]

import httpx
import psutil
from tiny_adapters import write_adapter
from tiny_packages import make_package

CLIENTS = 8
REGEX = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}


class Soak:
    """Clients that ask a server at `url` for all that its model `tiny` and its adapters `one` and `two` can do."""

    def __init__(self, url: str, *, seed: int = 0) -> None:
        self.url, self.requests, self.failures = url, 0, 0
        self._chance = random.Random(seed)

    async def run(self, *, seconds: float, requests: int | None = None) -> None:
        """Asks for so long, or so often when `requests` is given."""
        until_s = time.monotonic() + seconds
        until = self.requests + requests if requests else None

        async def client() -> None:
            async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
                while time.monotonic() < until_s and (until is None or self.requests < until):
                    self.requests += 1
                    await self._ask(http)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def _ask(self, http: httpx.AsyncClient) -> None:
        chance = self._chance
        start = [7] * 64 if chance.random() < 0.5 else []
        prompt = start + [chance.randrange(1, 384) for _ in range(chance.randrange(1, 120))]
        body = {
            "model": chance.choice(("tiny", "one", "two")), "prompt": prompt, "max_tokens": chance.randrange(1, 48),
            "temperature": chance.choice((0, 0.8)), "ignore_eos": True, "stream": chance.random() < 0.6,
        }  # fmt: skip
        kind = chance.random()
        if kind < 0.1:
            answer = await http.post("/v1/embeddings", json={"model": body["model"], "input": prompt})
        elif kind < 0.2:
            answer = await http.post("/v1/completions", json={**body, "max_tokens": 10**6})
            self.failures += answer.status_code != 400
            return
        elif kind < 0.3:
            messages = [{"role": "user", "content": str(prompt[:9])}]
            ask = {"model": body["model"], "messages": messages, "max_tokens": 20, "response_format": REGEX}
            answer = await http.post("/v1/chat/completions", json=ask)
        elif kind < 0.5 and body["stream"]:
            async with http.stream("POST", "/v1/completions", json=body) as stream:
                async for _ in stream.aiter_bytes():
                    return  # and with it the connection
            return
        else:
            answer = await http.post("/v1/completions", json=body)
        self.failures += answer.status_code != 200


def memory_bytes(pid: int) -> int:
    """Of the server and of its engine: what is theirs alone."""
    server = psutil.Process(pid)
    return sum(process.memory_full_info().uss for process in (server, *server.children(recursive=True)))


def start(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    package = make_package(folder / "tiny")
    for seed, name in enumerate(("one", "two")):
        write_adapter(folder / "adapters" / name, seed=seed)
    flags = ["--port", "0", "--adapters-dir", str(folder / "adapters"), "--max-adapters", "1", "--max-num-seqs", "8"]
    log = folder / "log.jsonl"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving", str(package), *flags], cwd=ROOT, stdout=out,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    while process.poll() is None:
        events = {event["event"]: event for line in log.read_text().splitlines() if (event := json.loads(line))}
        if "serving" in events:
            return process, f"http://127.0.0.1:{events['listening']['port']}"
        time.sleep(0.1)
    raise RuntimeError(f"the server ended: {log.read_text()}")


def main() -> None:
    seconds = float(os.environ.get("SOAK_S", "60"))
    with tempfile.TemporaryDirectory() as folder:
        process, url = start(Path(folder))
        try:
            soak = Soak(url)
            asyncio.run(soak.run(seconds=seconds / 3))
            before, after_warm = memory_bytes(process.pid), soak.requests
            asyncio.run(soak.run(seconds=seconds * 2 / 3))
            after = memory_bytes(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    count = soak.requests - after_warm
    rows = [
        {
            "name": f"memory after {count} more requests", "ours": after / 2**20, "peer": before / 2**20,
            "ratio": after / before, "goal": "< 1.01", "unit": "MiB",
        },
        {
            "name": "wrong statuses", "ours": soak.failures, "peer": soak.requests, "ratio": None, "goal": "0",
            "unit": "requests",
        },
    ]  # fmt: skip
    out = ROOT / "build/bench/serve_soak.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
