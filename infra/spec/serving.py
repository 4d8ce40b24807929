"""What is served: inference services and their autoscaling."""

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
