"""Prometheus metrics, in the names of docs/contracts.md. One registry a server, so that tests can have many."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from serving.engine.client import EngineProcess
from serving.engine.messages import Counters
from serving.pressure import MemoryWatch
from serving.sessions import Sessions

LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
OUTCOMES = ("stop", "length", "aborted", "invalid", "rejected", "unavailable", "deadline", "error")
LOAD_STAGES = ("check", "start", "weights", "first_token")


class Metrics:
    def __init__(self) -> None:
        disable_created_metrics()  # a `_created` series beside each counter doubles the page, and no rule reads it
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"slipway_serve_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"slipway_serve_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
            return Histogram(f"slipway_serve_{name}", text, buckets=bounds, registry=self.registry)

        self.waiting = gauge("requests_waiting", "Sequences that wait for their first token")
        self.running = gauge("requests_running", "Sequences in the batch")
        self.in_flight = gauge("requests_in_flight", "Waiting and running: has no ceiling, so it is what scales")
        self.queued_tokens = gauge("queued_tokens", "Prompt tokens that wait: what the queue is bounded by")
        self.requests = counter("requests_total", "Requests by outcome", "outcome")
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of accepted requests")
        self.ttft = histogram("ttft_seconds", "From a request's arrival to its first token", LATENCY_S)
        self.tpot = histogram("tpot_seconds", "Time per output token after the first, a request's mean", PER_TOKEN_S)
        self.itl = histogram("itl_seconds", "From one token to the next", PER_TOKEN_S)
        self.queue = histogram("queue_seconds", "From a request's arrival to its first step", LATENCY_S)
        self.kv_used = gauge("kv_used_ratio", "Share of the key-value blocks in use")
        self.bandwidth = gauge("memory_bandwidth_ratio", "Share of the memory's bandwidth in the latest steps")
        self.mfu = gauge("mfu_ratio", "Share of the peak FLOPs that the model's own were in the latest steps")
        self.free_bytes = gauge("memory_free_bytes", "Memory that this server may still take")
        self.ready = gauge("ready", "1 when a request would be answered now")
        self.model_info = gauge("model_info", "1 for the digest that is served", "digest")
        self.load = gauge("load_seconds", "How long the last load took, by stage", "stage")
        self.swaps = counter("model_swaps_total", "Models put in the place of another without a restart")
        self.engine = EngineCounters()
        self.registry.register(self.engine)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)  # present at 0, so that a rate over them is never "no data"
        for stage in LOAD_STAGES:
            self.load.labels(stage)

    def render(self, *, engines: list[EngineProcess], ready: bool, memory: MemoryWatch, sessions: Sessions) -> bytes:
        """The text of `/metrics`. Sequences are counted over all engines: one that is swapped out still works."""
        in_flight = sum(engine.in_flight for engine in engines)
        running = min(in_flight, sum(engine.running for engine in engines))
        self.running.set(running)
        self.waiting.set(in_flight - running)
        self.in_flight.set(in_flight)
        self.queued_tokens.set(sum(engine.queued_tokens for engine in engines))
        self.kv_used.set(max((engine.kv_used_ratio for engine in engines), default=0.0))
        self.bandwidth.set(max((engine.bandwidth_ratio for engine in engines), default=0.0))
        self.mfu.set(max((engine.mfu_ratio for engine in engines), default=0.0))
        memory.look()
        self.free_bytes.set(memory.free_bytes)
        self.ready.set(ready)
        self.engine.session_failures = sessions.failures
        self.engine.current = [engine.counters for engine in engines]
        return generate_latest(self.registry)


class EngineCounters(Collector):
    """What the engines and the sessions count themselves. An engine that has been swapped out leaves its sums behind."""

    def __init__(self) -> None:
        self.current: list[Counters] = []
        self.session_failures = 0
        self._retired = Counters()

    def retire(self, engine: EngineProcess) -> None:
        self._retired = _sum([self._retired, engine.counters])

    def collect(self) -> Iterable[CounterMetricFamily]:
        total = _sum([self._retired, *self.current])
        for name, text, value in (
            ("prefix_hit_tokens", "Prompt tokens found in the cache of prefixes", total.prefix_hit_tokens),
            ("prefix_miss_tokens", "Prompt tokens that had to be computed", total.prefix_miss_tokens),
            (
                "preemptions",
                "Sequences thrown out of the batch for want of blocks, to be computed again",
                total.preemptions,
            ),
            ("aborts", "Sequences whose client left before their end", total.aborts),
            ("adapter_loads", "Adapters read into memory", total.adapter_loads),
            ("adapter_evictions", "Adapters that made room for others", total.adapter_evictions),
            ("output_tokens", "Tokens made", total.output_tokens),
        ):
            yield CounterMetricFamily(f"slipway_serve_{name}", text, value=value)
        stores = CounterMetricFamily(
            "slipway_serve_store_failures", "How often a store did not answer", labels=["store"]
        )
        stores.add_metric(["sessions"], self.session_failures)
        stores.add_metric(["kv_spill"], total.spill_failures)
        yield stores


def _sum(counters: list[Counters]) -> Counters:
    return Counters(*(sum(values) for values in zip(*counters, strict=True)))
