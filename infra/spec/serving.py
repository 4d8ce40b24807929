"""What is served: inference services, their autoscaling, the router in front, monitoring."""

from typing import Annotated, Any, Literal, Self, cast

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
from infra.spec.runtimes import OWN, Api
from infra.spec.training import Dtype, PodResources

PRE_STOP_S = 8
"""Before SIGTERM: until the router knows a replica that became ready when this one was told to go. A name lives 5 s in the
cluster's DNS, the router asks each 2 s, and looks whether it is well each second."""
LINGER_S = 3
"""After SIGTERM a server that drains says that it is not ready, and answers on until the router has heard of it."""
EXIT_S = 10
"""After the drain: closing sockets, the engine's exit."""


Quantized = Literal["int8", "int4"]
Guesses = Annotated[int, Field(ge=0, le=16)]
WIDENED = "on a GPU these weights would be widened again at each step, which takes longer than reading wide ones; leave it out"


class Autoscaling(Spec):
    by: Literal["hpa", "keda"] = "hpa"
    """What scales: a HorizontalPodAutoscaler, which needs a metrics adapter, or a ScaledObject of KEDA, which asks Prometheus itself
    (`monitoring.prometheus_url`)."""
    min_replicas: NonNegativeInt = 1
    """Replicas that are always there. 0, with KEDA: none while nobody calls; a request that finds none is answered with 503 and
    Retry-After, and brings one."""
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
        if self.min_replicas == 0 and self.by == "hpa":
            raise Misplaced(
                "a HorizontalPodAutoscaler keeps one replica at least; KEDA goes to 0 (by: keda)", "min_replicas"
            )
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


class Adapter(Spec):
    """A LoRA adapter in PEFT's layout, in the registry under a name of its own."""

    name: Name
    """What requests name as their model."""
    model: Name
    """Name in the registry."""
    channel: Name = "production"
    """Registry channel that is followed, without a restart."""
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """One entry of the registry, for good; null: the channel's."""


class Store(Spec):
    """A Redis or Valkey of the user's own, in which any replica finds what another has left there."""

    secret: Name
    """Secret whose `url` says where: `redis://…` (`rediss://` over TLS), with its password."""
    namespace: Name | None = None
    """Namespace whose pods keep it; null: it is outside of the cluster."""
    port: Port = 6379
    """Port that it listens on, the one port that network policies open to it."""


class Service(Spec):
    name: Name
    """Name of the service."""
    model: Name
    """Name of the model: the `name` of the stack's training, or any in the registry."""
    channel: Name = "production"
    """Registry channel that it follows."""
    runtime: Name = OWN
    """What answers: `slipway`, `onnx`, `vllm`, `sglang`, `triton`, `tensorflow-serving`, or one of the stack's `runtimes`."""
    api: Api = "openai"
    """What its clients speak; a runtime that does not is refused."""
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
    kv_share: Share | None = None
    """The same as a share of what the weights and the computing leave of a replica's memory; the plan says how much that is, and
    every runtime is told that."""
    dtype: Dtype = "auto"
    """Compute type."""
    drain_s: PositiveInt = 60
    """Longest time that streams in flight get to finish at a roll-out, seconds."""
    surge: bool = False
    """The pool has room for one replica more during a roll-out; False: a roll-out needs none."""
    load_s: PositiveInt | None = None
    """Time to load the model, seconds, which sizes the startup probe; null: estimated."""
    api_keys_secret: Name | None = None
    """Secret whose `keys.json` holds the hashes of API keys (`python -m serving.auth NAME` makes one); null: everyone may ask."""
    session_store: Store | None = None
    """Where the chat page's sessions are kept; null: in each replica's memory, so that another replica asks to log in again."""
    prefix_store: Store | None = None
    """Where prefixes go that leave the KV cache, for every replica to find; null: they are computed again."""
    spill_gib: PositiveFloat | None = None
    """Memory beside the KV cache that such prefixes go to instead, each replica's own, GiB."""
    quantize: Quantized | None = None
    """Form that the layers' weights get when they are loaded, on a CPU: about a quarter, or a seventh, of float32; null: `dtype`."""
    speculate_tokens: Guesses = 0
    """Tokens that are guessed where the text repeats itself, and checked in one step: the same answers, sooner."""
    attention: Literal["sdpa", "flash"] = "sdpa"
    """What computes attention on a GPU: torch's own, or FlashAttention with CUDA graphs, in bfloat16."""
    files_claim: Name | None = None
    """PersistentVolumeClaim that all replicas mount, where `/v1/files` and `/v1/batches` keep theirs; null: no such routes."""
    adapters: tuple[Adapter, ...] = ()
    """LoRA adapters of the model that requests may ask for by name."""
    cache_gib: PositiveFloat | None = None
    """Volume that keeps copied models and compiled kernels over restarts, GiB; null: a new pod starts cold."""

    @model_validator(mode="after")
    def _one_size_of_the_cache(self) -> Self:
        if self.kv_share is not None and "kv_gib" in self.model_fields_set:
            raise Misplaced("kv_gib says how large the cache is already; leave one of the two out", "kv_share")
        return self

    @model_validator(mode="after")
    def _one_place_for_prefixes(self) -> Self:
        if self.spill_gib is not None and self.prefix_store is not None:
            raise Misplaced("prefixes go to prefix_store already; leave one of the two out", "spill_gib")
        if self.spill_gib is not None and self.spill_gib >= self.resources.memory_gib:
            raise Misplaced(
                f"{self.spill_gib:g} is not below resources.memory_gib {self.resources.memory_gib:g}", "spill_gib"
            )
        return self

    @property
    def stores(self) -> dict[str, Store]:
        """What its replicas share, by what is kept there."""
        found = {"session": self.session_store, "prefix": self.prefix_store}
        return {what: store for what, store in found.items() if store}

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


class OutlierEjection(Spec):
    """When a replica that answers badly is left alone for a while."""

    consecutive_errors: PositiveInt = 5
    """5xx answers and broken connections in a row."""
    ejected_s: PositiveInt = 10
    """First time away, seconds; it grows with each further one."""
    max_percent: Annotated[int, Field(ge=1, le=100)] = 50
    """Replicas that may be away at once, percent."""


class Circuit(Spec):
    """What one router pod sends to a service at most; above it the answer is 503 at once, with `Retry-After`."""

    connections: PositiveInt = 65_536
    """Connections to its replicas."""
    requests: PositiveInt = 65_536
    """Requests in flight. The server's own limit is in tokens, and answers 429."""
    pending: PositiveInt = 65_536
    """Requests that wait for a connection."""
    retries: PositiveInt = 64
    """Retries in flight: in an outage they must not become the load."""


HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]*$")]
"""Without underscores, with which the router refuses a request: what stands behind may take them for dashes."""
CookieName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")]
"""RFC 6265, a token."""
HASHED = ("hash_header", "hash_cookie", "hash_prefix_chars")
"""Keys of a router that say what is hashed."""


class Router(Spec):
    policy: Literal["round_robin", "random", "least_request", "ring_hash", "maglev"] = "least_request"
    """How a replica is chosen. Where a `hash_` key is given the default is maglev, which moves fewer sessions than ring_hash."""
    hash_header: HeaderName | None = None
    """Request header that ring_hash and maglev hash; without any of these keys: the client's address."""
    hash_cookie: CookieName | None = None
    """Cookie of the clients' own that ring_hash and maglev hash."""
    hash_prefix_chars: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Characters of the prompt's beginning that ring_hash and maglev hash: what begins alike finds the same prefix cache."""
    hash_balance_percent: Annotated[int, Field(ge=100, le=10_000)] | None = None
    """Most that ring_hash and maglev give a replica, percent of the mean; what is above goes to the next one. null: no limit."""
    cookie: CookieName | None = None
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
    idle_timeout_s: PositiveInt | None = None
    """Longest silence in an answer, seconds; null: as long as a stream, since what is not streamed is silent until its end."""
    retries: NonNegativeInt = 3
    """Other replicas that are tried before the first byte of an answer; what has begun is never sent twice."""
    outliers: OutlierEjection | None = OutlierEjection()
    """Replicas that answer badly are left alone; null: never."""
    circuit: Circuit = Circuit()
    """Limits towards each service."""

    @model_validator(mode="before")
    @classmethod
    def _what_is_hashed_is_so_by_maglev(cls, values: Any) -> Any:
        given = cast("dict[Any, Any]", values) if isinstance(values, dict) else {}
        if "policy" not in given and any(given.get(key) is not None for key in HASHED):
            return given | {"policy": "maglev"}
        return cast(Any, values)

    @model_validator(mode="after")
    def _hash_needs_a_hash_policy(self) -> Self:
        hashed = [key for key in HASHED if getattr(self, key) is not None]
        balanced = ["hash_balance_percent"] if self.hash_balance_percent is not None else []
        for key in () if self.hashes else (*hashed, *balanced):
            raise Misplaced(f"needs policy ring_hash or maglev, and policy is {self.policy}", key)
        if len(hashed) > 1:
            raise Misplaced(f"{hashed[0]} is hashed already; leave one of the two out", hashed[1])
        return self

    @property
    def hashes(self) -> bool:
        """The policy sends what hashes alike to the same replica."""
        return self.policy in ("ring_hash", "maglev")


class Objectives(Spec):
    """What the alerts hold the services to."""

    ttft_p95_s: PositiveFloat = 2.0
    """Time to first token, 95th percentile, seconds."""
    tpot_p95_s: PositiveFloat = 0.2
    """Time per output token, 95th percentile, seconds."""
    availability: Share = 0.999
    """Share of requests answered without a server error."""


AlertName = Literal[
    "SlipwayTimeToFirstTokenHigh",
    "SlipwayTimePerTokenHigh",
    "SlipwayErrorBudgetBurning",
    "SlipwayNoReplicaReady",
    "SlipwayAtMaxReplicas",
    "SlipwayTrainingStalled",
    "SlipwayCheckpointOverdue",
    "SlipwayLossNotFinite",
    "SlipwayJobFailed",
]


class Alert(Spec):
    enabled: bool = True
    """False: it is not declared."""
    after_s: NonNegativeInt | None = None
    """Seconds that its condition holds before it fires; null: as long as suits what it tells."""


class Collector(Spec):
    """Where spans go, by OTLP over HTTP."""

    url: Annotated[str, Field(pattern=r"^https?://[^/:@]+:\d{1,5}$")]
    """Its address: `http://collector.observability:4318`."""
    namespace: Name | None = None
    """Namespace whose pods it is; null: it is outside of the cluster."""

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


class Monitoring(Spec):
    enabled: bool = True
    """ServiceMonitor, PodMonitor, PrometheusRule and Grafana dashboards (the operator's CRDs must be there)."""
    prometheus_url: str | None = None
    """Address of Prometheus inside the cluster, for what asks it: `http://prometheus-operated.monitoring:9090`."""
    scrape_interval_s: PositiveInt = 15
    """Seconds between scrapes."""
    labels: dict[str, str] = Field(default={"release": "prometheus"})
    """Labels by which the operator's Prometheus selects monitors and rules."""
    objectives: Objectives = Objectives()
    """Thresholds of the alerts."""
    alerts: dict[AlertName, Alert] = Field(default={})
    """What is other than usual of single alerts: `{SlipwayJobFailed: {enabled: false}}`."""
    namespace: str | None = None
    """Namespace of the dashboards' ConfigMaps; null: the stack's."""
    collector: Collector | None = None
    """OpenTelemetry collector that Slipway's servers send a span a request to; null: none."""


class Budget(Spec):
    usd_per_h: NonNegativeFloat | None = None
    """Most that the stack's nodes may cost in an hour at full scale, USD."""
    usd_per_run: NonNegativeFloat | None = None
    """Most that one training run may cost, USD."""
