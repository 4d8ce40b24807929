# ruff: noqa: E402 (the path must be set before the tests' helpers are imported)
"""What others notice of bad input: how long a request takes while somebody sends what is to be refused, beside how long
it takes alone, kind by kind and in turns. And what a thousand streams that wait cost in memory.
"""

import asyncio
import contextlib
import json
import resource
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/unit/serving")]

import httpx

from tests.bench.bench_serve_soak import memory_bytes, start

PAIRS, STREAMS, PAUSE_S = 15, 1000, 0.1
ROUTE = "/v1/completions"
GOOD = {"model": "tiny", "prompt": "def main", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


def structure(kind: str, text: str) -> bytes:
    return json.dumps({**GOOD, "max_tokens": 4, "response_format": {"type": kind, kind: text}}).encode()


# What somebody sends ten times a second while the good request runs; each is refused, or ends by itself.
BAD = {
    "too large a body": b"x" * (12 << 20),
    "no JSON": b'{"model": "tiny", "prompt"',
    "no UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe"}',
    "nested deeply": b'{"model": "tiny", "prompt": ' + b"[" * 100_000,
    "wrong types": json.dumps({**GOOD, "max_tokens": [], "temperature": "hot"}).encode(),
    "an unknown model": json.dumps({**GOOD, "model": "x" * 1000}).encode(),
    "too long a prompt": json.dumps({**GOOD, "prompt": "word " * 100_000}).encode(),
    "not a number": b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    "a regex that explodes": structure("regex", "(((a{1000}){1000}){1000}){1000}"),
    "a regex that backtracks": structure("regex", "(a*)*(a*)*(a*)*b" * 20),
    "a grammar that is none": structure("grammar", "start: nothing"),
}


async def send_again_and_again(http: httpx.AsyncClient, body: bytes) -> None:
    while True:
        with contextlib.suppress(httpx.TransportError):  # a body that is too large is not read to its end
            await http.post(ROUTE, content=body)
        await asyncio.sleep(PAUSE_S)


@contextlib.asynccontextmanager
async def slow_heads(url: str) -> AsyncIterator[None]:
    """Connections whose heads never end, and are open for as long."""
    host, port = url.removeprefix("http://").split(":")
    opened = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
    for _, writer in opened:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
    yield
    for _, writer in opened:
        writer.close()


async def good_s(http: httpx.AsyncClient) -> float:
    begin_s = time.perf_counter()
    answer = await http.post(ROUTE, json=GOOD)
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - begin_s


async def slowdowns(url: str) -> dict[str, tuple[float, float]]:
    """Of each kind of bad input: how long a good request takes beside it, and alone; medians of turns."""
    found = {}
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        await good_s(http)
        for kind, body in [*BAD.items(), ("heads that never end", b"")]:
            alone, beside = [], []
            for _ in range(PAIRS):
                alone.append(await good_s(http))
                if body:
                    bad = asyncio.create_task(send_again_and_again(http, body))
                    beside.append(await good_s(http))
                    bad.cancel()
                    await asyncio.gather(bad, return_exceptions=True)
                else:
                    async with slow_heads(url):
                        beside.append(await good_s(http))
            found[kind] = (statistics.median(beside), statistics.median(alone))
    return found


def waiting_streams_bytes(url: str, pid: int) -> float:
    """What the server and its engine take more while so many streams are open and wait, than before."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**GOOD, "stream": True}).encode()
    head = f"POST {ROUTE} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    def in_flight() -> float:
        lines = httpx.get(url + "/metrics", timeout=60).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("slipway_serve_requests_in_flight "))

    before = memory_bytes(pid)
    with contextlib.ExitStack() as stack:
        for _ in range(STREAMS):
            stack.enter_context(socket.create_connection((host, int(port)))).sendall(head + body)
        while in_flight() < 0.9 * STREAMS:
            time.sleep(0.1)
        return memory_bytes(pid) - before


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        process, url = start(Path(folder))
        try:
            found = asyncio.run(slowdowns(url))
            taken = waiting_streams_bytes(url, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    rows = [
        {"name": f"a request beside {kind}", "ours": beside * 1e3, "peer": alone * 1e3, "ratio": beside / alone,
         "goal": "≤ 1.1", "unit": "ms"}
        for kind, (beside, alone) in found.items()
    ]  # fmt: skip
    goal = {"goal": "≤ 200", "unit": "MiB"}
    rows.append({"name": f"{STREAMS} streams that wait", "ours": taken / 2**20, "peer": None, "ratio": None, **goal})
    out = ROOT / "build/bench/serve_hostile.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
