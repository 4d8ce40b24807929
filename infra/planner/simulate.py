"""A replica under traffic, step by step: continuous batching as servers do it, with arrivals and lengths drawn from a fixed seed.

Each step decodes one token of every running sequence and fills what is left of its token budget with prompts in order of arrival
(chunked prefill). A request starts when the KV cache has room for its whole length. Service times are `Server.mixed_s`; between two
arrivals or ends nothing changes but the contexts, so that steps of the same kind are taken together.
"""

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from infra.planner.serve_time import SCHEDULER_S, Server

SEED = 20260101


@dataclass(frozen=True, kw_only=True)
class Load:
    """Traffic of one replica: Poisson arrivals, log-normal lengths."""

    rps: float
    prompt_tokens: float
    output_tokens: float
    spread: float = 0.5
    """Standard deviation of lengths over their mean."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a replica can hold."""

    cache_tokens: float
    sequences: int
    batched_tokens: int = 2048
    """Tokens of a step: decoding sequences and prompt chunks together."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    tokens_per_s: float
    """Output tokens."""
    simulated_s: float
    requests: int
    keeps_up: bool
    """The queue did not grow: the last quarter of the requests waited no more than twice as long as the second, or half a second (of
    a queue that grows steadily it waits 2.3 times as long)."""


@dataclass(slots=True)
class _Request:
    arrival: float
    prompt: int
    output: int
    to_prefill: int
    made: int = 0
    first: float = 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile of sorted `values`; 0 of none."""
    return values[max(math.ceil(share * len(values)) - 1, 0)] if values else 0.0


def requests_of(load: Load, *, number: int, most_tokens: float, seed: int = SEED) -> list[_Request]:
    """`number` requests, none longer than the cache."""
    draw = random.Random(seed)  # noqa: S311 - a simulation that must repeat itself, and no secret
    sigma = math.sqrt(math.log1p(load.spread**2))

    def length(mean: float) -> int:
        value = draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma) if sigma else mean
        return max(round(min(value, most_tokens / 2 - 0.5)), 1)

    clock, made = 0.0, list[_Request]()
    for _ in range(number):
        clock += draw.expovariate(load.rps)
        prompt = length(load.prompt_tokens)
        made.append(_Request(clock, prompt, length(load.output_tokens), prompt))
    return made


@lru_cache(maxsize=1024)
def simulate(server: Server, *, load: Load, room: Room, requests: int = 200, seed: int = SEED) -> Latency:
    """Latencies of `requests` requests on one replica. Raises ValueError for a cache that holds no request."""
    if room.cache_tokens < 2:
        raise ValueError("the KV cache holds no request")
    arriving = deque(requests_of(load, number=requests, most_tokens=room.cache_tokens, seed=seed))
    waiting, running, done = deque[_Request](), list[_Request](), list[tuple[_Request, float]]()
    clock, held = 0.0, 0
    while arriving or waiting or running:
        while arriving and arriving[0].arrival <= clock:
            waiting.append(arriving.popleft())
        while waiting and len(running) < room.sequences and held + _size(waiting[0]) <= room.cache_tokens:
            held += _size(waiting[0])
            running.append(waiting.popleft())
        if not running:
            clock = arriving[0].arrival
            continue
        clock = _step(server, running, clock=clock, room=room, until=arriving[0].arrival if arriving else math.inf)
        for request in [request for request in running if request.made >= request.output]:
            running.remove(request)
            held -= _size(request)
            done.append((request, clock))
    return _latency(done, clock=clock)


def _size(request: _Request) -> int:
    return request.prompt + request.output


def _step(server: Server, running: list[_Request], *, clock: float, room: Room, until: float) -> float:
    """Run one step, or as many alike as fit before anything changes; the clock after it."""
    decoding, starting = list[_Request](), list[_Request]()
    for request in running:
        (starting if request.to_prefill else decoding).append(request)
    context = sum([request.prompt + request.made for request in decoding]) / max(len(decoding), 1)
    budget, chunk, before, finished = max(room.batched_tokens - len(decoding), 1), 0, 0.0, list[_Request]()
    for request in starting:
        take = min(request.to_prefill, budget - chunk)
        before += take * (request.prompt - request.to_prefill + take / 2)
        request.to_prefill -= take
        chunk += take
        if not request.to_prefill:
            finished.append(request)
    step = SCHEDULER_S + server.mixed_s(
        decoding=len(decoding), context=context, prefill=chunk, prefill_context=before / max(chunk, 1)
    )
    times = 1
    if not chunk:
        # Nothing to prefill: the same step again until a sequence ends or a request arrives; contexts grow by few tokens.
        times = min(request.output - request.made for request in decoding)
        times = max(min(times, 64, math.ceil((until - clock) / step) if until < math.inf else times), 1)
    clock += times * step
    for request in decoding:
        request.made += times
    for request in finished:  # a prompt's last chunk gives the first token
        request.made, request.first = 1, clock
    return clock


def _latency(done: list[tuple[_Request, float]], *, clock: float) -> Latency:
    ttft = sorted(request.first - request.arrival for request, _ in done)
    tpot = sorted((end - request.first) / (request.output - 1) for request, end in done if request.output > 1)
    by_arrival = [request.first - request.arrival for request, _ in sorted(done, key=lambda pair: pair[0].arrival)]
    quarter = len(by_arrival) // 4
    early, late = sum(by_arrival[quarter : 2 * quarter]), sum(by_arrival[3 * quarter :][:quarter])
    return Latency(
        ttft_p50_s=percentile(ttft, 0.5),
        ttft_p95_s=percentile(ttft, 0.95),
        tpot_p50_s=percentile(tpot, 0.5),
        tpot_p95_s=percentile(tpot, 0.95),
        tokens_per_s=sum(request.output for request, _ in done) / clock,
        simulated_s=clock,
        requests=len(done),
        keeps_up=late <= max(2 * early, 0.5 * quarter),
    )
