# ruff: noqa: E402 (the path must be set before the tests' helpers are imported)
"""What others notice of bad input: how long a request takes while somebody sends what is to be refused, beside how long
it takes alone. And what a thousand streams that wait cost in memory.

Fair on a machine that others use: each kind is measured in pairs, alone and beside, whose order takes turns, and the
median of the pairs' ratios is told; of a third as many pairs it varied by a tenth from run to run. The server has one
processor for all of its processes and the clients have another, so that what it takes to send bad input is not counted
as what it takes to refuse it. Beside that the processor time that one bad request takes of the server, which is the same
however busy the machine: at ten a second 10 ms are a tenth.
"""

import asyncio
import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/unit/serving")]

import httpx
import psutil

from tests.bench.bench_serve_soak import memory_bytes, start

PAIRS, STREAMS, PAUSE_S = 45, 1000, 0.1
LARGE_BYTES, REPEATS = 1 << 18, {False: 100, True: 10}
ROUTE, HEADS = "/v1/completions", "heads that never end"
GOOD = {"model": "tiny", "prompt": "def main", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


def structure(kind: str, text: str) -> bytes:
    """A request for it, where each number sign is another letter each time: what is refused once would be remembered."""
    return json.dumps({**GOOD, "max_tokens": 4, "response_format": {"type": kind, kind: text}}).encode()


def ids(last: str) -> bytes:
    return b'{"model": "tiny", "prompt": [' + b"1," * 500_000 + last.encode() + b"]}"


# What somebody sends ten times a second while the good request runs; each is refused, or ends by itself.
BAD = {
    "too large a body": b"x" * (12 << 20),
    "half a million ids": ids("1"),
    "half a million ids and a word": ids('"x"'),
    "no JSON": b'{"model": "tiny", "prompt"',
    "no UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe"}',
    "nested deeply": b'{"model": "tiny", "prompt": ' + b"[" * 100_000,
    "wrong types": json.dumps({**GOOD, "max_tokens": [], "temperature": "hot"}).encode(),
    "an unknown model": json.dumps({**GOOD, "model": "x" * 1000}).encode(),
    "too long a prompt": json.dumps({**GOOD, "prompt": "word " * 100_000}).encode(),
    "not a number": b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    "a regex that explodes": structure("regex", "(((#{1000}){1000}){1000}){1000}"),
    "a regex that backtracks": structure("regex", "(a*)*(a*)*(a*)*#" * 20),
    "a grammar that is none": structure("grammar", "start: nothing#"),
}


def numbered(body: bytes, number: int) -> bytes:
    return body if len(body) > LARGE_BYTES else body.replace(b"#", b"x" * (1 + number % 97))


async def send_again_and_again(url: str, body: bytes) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for number in itertools.count():
            with contextlib.suppress(httpx.TransportError):  # a body that is too large is not read to its end
                await http.post(ROUTE, content=numbered(body, number))
            await asyncio.sleep(PAUSE_S)


async def hold_heads(url: str) -> None:
    """Connections whose heads never end, and are open for as long."""
    host, port = url.removeprefix("http://").split(":")
    opened = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
    for _, writer in opened:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
    try:
        await asyncio.sleep(3600)
    finally:
        for _, writer in opened:
            writer.close()


async def attack(url: str) -> None:
    """The attacker's process: each line that it reads is the kind of what it sends from then on, or empty."""
    os.nice(10)  # behind the one whose time is taken
    attacks = {kind: partial(send_again_and_again, url, body) for kind, body in BAD.items()}
    attacks[HEADS] = partial(hold_heads, url)
    while line := await asyncio.to_thread(sys.stdin.readline):
        if kind := line.strip():
            task = asyncio.create_task(attacks[kind]())
        else:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        print("done", flush=True)


class Attacker:
    def __init__(self, url: str) -> None:
        command = [sys.executable, __file__, url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @contextlib.contextmanager
    def sending(self, kind: str) -> Iterator[None]:
        self._tell(kind)
        yield
        self._tell("")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        self._process.stdout.readline()


def good_s(http: httpx.Client) -> float:
    begin_s = time.perf_counter()
    answer = http.post(ROUTE, json=GOOD)
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - begin_s


def slowdowns(url: str) -> dict[str, tuple[float, float, float]]:
    """Of each kind of bad input: how long a good request takes beside it, and alone, and the median of the ratios."""
    found, attacker = {}, Attacker(url)
    with contextlib.closing(httpx.Client(base_url=url, timeout=60)) as http, contextlib.ExitStack() as stack:
        stack.callback(attacker.end)
        for kind in [*BAD, HEADS]:
            pairs = []
            with attacker.sending(kind):
                good_s(http)  # whatever is made at the first of its kind is made
            for number in range(PAIRS):
                times = {}
                for beside in (False, True) if number % 2 else (True, False):
                    with attacker.sending(kind) if beside else contextlib.nullcontext():
                        times[beside] = good_s(http)
                pairs.append((times[True], times[False]))
            ratio = statistics.median(beside / alone for beside, alone in pairs)
            found[kind] = (*(statistics.median(times) for times in zip(*pairs, strict=True)), ratio)
    return found


def costs_s(url: str, pid: int) -> dict[str, float]:
    """Of each kind of bad input: the processor time that the server's processes take for one, those that may wait left out."""

    def used_s() -> float:
        processes = [psutil.Process(pid), *psutil.Process(pid).children()]
        return sum(sum(process.cpu_times()[:2]) for process in processes if process.nice() == os.nice(0))

    found = {}
    with httpx.Client(base_url=url, timeout=60) as http:
        for kind, body in BAD.items():
            begin_s = used_s()
            for number in range(REPEATS[len(body) > LARGE_BYTES]):
                http.post(ROUTE, content=numbered(body, number))
            found[kind] = (used_s() - begin_s) / REPEATS[len(body) > LARGE_BYTES]
    return found


def share_processors(pid: int) -> None:
    """The server's processes and threads on the first processor, and this one on the others; with one, all on it."""
    first, *others = sorted(os.sched_getaffinity(0))
    if others:
        for process in (psutil.Process(pid), *psutil.Process(pid).children()):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {first})
        os.sched_setaffinity(0, others)


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
            share_processors(process.pid)
            found = slowdowns(url)
            costs = costs_s(url, process.pid)
            taken = waiting_streams_bytes(url, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    rows = [
        {"name": f"a request beside {kind}", "ours": beside * 1e3, "peer": alone * 1e3, "ratio": ratio,
         "goal": "≤ 1.1", "unit": "ms"}
        for kind, (beside, alone, ratio) in found.items()
    ]  # fmt: skip
    rows += [
        {"name": f"processor time for {kind}", "ours": cost * 1e3, "peer": None, "ratio": None, "goal": "≤ 10", "unit": "ms"}
        for kind, cost in costs.items()
    ]  # fmt: skip
    goal = {"goal": "≤ 200", "unit": "MiB"}
    rows.append({"name": f"{STREAMS} streams that wait", "ours": taken / 2**20, "peer": None, "ratio": None, **goal})
    out = ROOT / "build/bench/serve_hostile.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    asyncio.run(attack(sys.argv[1])) if sys.argv[1:] else main()
