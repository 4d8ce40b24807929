"""Prometheus metrics, in the names of docs/contracts.md. One registry a server, so that tests can have many."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from serving.engine.client import EngineProcess

LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)


class Metrics:
    def __init__(self) -> None:
        disable_created_metrics()  # a `_created` series beside each counter doubles the page, and no rule reads it
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"slipway_serve_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"slipway_serve_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"slipway_serve_{name}", text, buckets=buckets, registry=self.registry)

        self.waiting = gauge("requests_waiting", "Sequences that wait for their first token")
        self.running = gauge("requests_running", "Sequences in the batch")
        self.in_flight = gauge("requests_in_flight", "Waiting and running: has no ceiling, so it is what scales")
        self.requests = counter("requests_total", "Requests by outcome", "outcome")
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of accepted requests")
        self.output_tokens = counter("output_tokens_total", "Tokens made")
        self.ttft = histogram("ttft_seconds", "From a request's arrival to its first token", LATENCY_S)
        self.tpot = histogram("tpot_seconds", "Time per output token after the first, a request's mean", PER_TOKEN_S)
        self.queue = histogram("queue_seconds", "From a request's arrival to its first step", LATENCY_S)
        self.kv_used = gauge("kv_used_ratio", "Share of the key-value blocks in use")
        self.ready = gauge("ready", "1 when a request would be answered now")
        self.model_info = gauge("model_info", "1 for the digest that is served", "digest")
        for outcome in ("stop", "length", "aborted", "invalid", "rejected", "unavailable", "error"):
            self.requests.labels(outcome)  # present at 0, so that a rate over them is never "no data"

    def render(self, *, engines: list[EngineProcess], ready: bool) -> bytes:
        """The text of `/metrics`. Sequences are counted over all engines: one that is swapped out still works."""
        in_flight = sum(engine.in_flight for engine in engines)
        running = min(in_flight, sum(engine.running for engine in engines))
        self.running.set(running)
        self.waiting.set(in_flight - running)
        self.in_flight.set(in_flight)
        self.kv_used.set(max((engine.kv_used_ratio for engine in engines), default=0.0))
        self.ready.set(ready)
        return generate_latest(self.registry)
