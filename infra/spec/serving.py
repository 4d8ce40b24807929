"""What is served: inference services, their autoscaling, the router in front, monitoring."""

from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from infra.spec.base import (
    OR_AUTO,
    Auto,
    Misplaced,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    Port,
    PositiveFloat,
    PositiveInt,
    Share,
    Spec,
)
from infra.spec.training import Dtype, PodResources


class Autoscaling(Spec):
    min_replicas: PositiveInt = 1
    """Replicas that are always there."""
    max_replicas: PositiveInt
    """Replicas at most; the checks hold it against the pool."""
    target_in_flight: PositiveFloat = 8
    """Requests, waiting and running, that one replica should hold: a signal with no ceiling."""
    scale_down_after_s: NonNegativeInt = 300
    """Stabilisation window before replicas are taken away, seconds."""

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise Misplaced(f"{self.min_replicas} is above max_replicas {self.max_replicas}", "min_replicas")
        return self


class Traffic(Spec):
    """Requests that a service is sized for."""

    rps: PositiveFloat
    """Requests a second at the peak, arriving at random."""
    prompt_tokens: PositiveInt = 512
    """Mean length of a prompt."""
    output_tokens: PositiveInt = 128
    """Mean length of an answer."""
    spread: NonNegativeFloat = 0.5
    """Standard deviation of the lengths over their mean (log-normal); 0: all alike."""


class Slo(Spec):
    """Latency that the planner sizes a service for; each at the 95th percentile."""

    ttft_p95_s: PositiveFloat = 1.0
    """Time to first token, seconds."""
    tpot_p95_s: PositiveFloat | None = None
    """Time per output token after the first, seconds; null: any."""


class Service(Spec):
    name: Name
    """Name of the service."""
    model: Name
    """Name of the model: the `name` of the stack's training, or any in the registry."""
    channel: Name = "production"
    """Registry channel that it follows."""
    pool: Name
    """Node pool that it runs on."""
    gpus: NonNegativeInt = 0
    """GPUs of one replica."""
    replicas: Annotated[Annotated[PositiveInt, Tag("given")] | Auto, OR_AUTO] = 1
    """Replicas; with `autoscaling`, left to it. `auto`: the fewest that meet `slo` under `traffic`."""
    traffic: Traffic | None = None
    """What it is sized for; with it the plan tells latency and the price of a million tokens."""
    slo: Slo = Slo()
    """Latency that `auto` sizes for."""
    autoscaling: Autoscaling | None = None
    """Scale on requests in flight; null: a fixed number of replicas."""
    resources: PodResources
    """CPU and memory of one replica."""
    max_model_len: PositiveInt | None = None
    """Longest context in tokens; null: the model's."""
    max_num_seqs: PositiveInt = 16
    """Sequences that decode together."""
    max_queued_tokens: PositiveInt = 65_536
    """Prompt tokens that may wait before new requests get 429."""
    kv_gib: PositiveFloat = 1.0
    """Memory of the KV cache, GiB."""
    dtype: Dtype = "auto"
    """Compute type."""
    drain_s: PositiveInt = 60
    """Longest time that streams in flight get to finish at a roll-out, seconds."""
    surge: bool = False
    """The pool has room for one replica more during a roll-out; False: a roll-out needs none."""
    load_s: PositiveInt | None = None
    """Time to load the model, seconds, which sizes the startup probe; null: estimated."""

    @property
    def fixed_replicas(self) -> int:
        """`replicas`, once the planner has chosen what was left to it."""
        assert isinstance(self.replicas, int), "resolve the stack first (infra.planner.resolve)"
        return self.replicas

    @property
    def least_replicas(self) -> int:
        return self.autoscaling.min_replicas if self.autoscaling else self.fixed_replicas

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.fixed_replicas


class Router(Spec):
    policy: Literal["round_robin", "random", "least_request", "ring_hash", "maglev"] = "least_request"
    """How a replica is chosen."""
    hash_header: str | None = None
    """Request header that ring_hash and maglev hash; null: the client's address."""
    cookie: str | None = None
    """Name of a session cookie: requests that carry it go to the replica that first answered."""
    cookie_ttl_s: PositiveInt = 3600
    """Life of that cookie, seconds."""
    port: Port = 8080
    """Port at which the endpoint is published."""
    expose: Literal["ClusterIP", "LoadBalancer"] = "LoadBalancer"
    """Type of the router's Service."""
    replicas: PositiveInt = 2
    """Envoy pods."""
    stream_timeout_s: PositiveInt = 3600
    """Longest stream, seconds."""

    @model_validator(mode="after")
    def _hash_needs_a_hash_policy(self) -> Self:
        if self.hash_header and self.policy not in ("ring_hash", "maglev"):
            raise Misplaced(f"needs policy ring_hash or maglev, and policy is {self.policy}", "hash_header")
        return self


class Objectives(Spec):
    """What the alerts hold the services to."""

    ttft_p95_s: PositiveFloat = 2.0
    """Time to first token, 95th percentile, seconds."""
    tpot_p95_s: PositiveFloat = 0.2
    """Time per output token, 95th percentile, seconds."""
    availability: Share = 0.999
    """Share of requests answered without a server error."""


class Monitoring(Spec):
    enabled: bool = True
    """ServiceMonitor, PodMonitor, PrometheusRule and Grafana dashboards (the operator's CRDs must be there)."""
    scrape_interval_s: PositiveInt = 15
    """Seconds between scrapes."""
    labels: dict[str, str] = Field(default={"release": "prometheus"})
    """Labels by which the operator's Prometheus selects monitors and rules."""
    objectives: Objectives = Objectives()
    """Thresholds of the alerts."""
    namespace: str | None = None
    """Namespace of the dashboards' ConfigMaps; null: the stack's."""


class Budget(Spec):
    usd_per_h: NonNegativeFloat | None = None
    """Most that the stack's nodes may cost in an hour at full scale, USD."""
    usd_per_run: NonNegativeFloat | None = None
    """Most that one training run may cost, USD."""
