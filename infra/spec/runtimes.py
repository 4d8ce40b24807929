"""What answers behind a service: Slipway's own server or another's, as rows of one table that a stack file can add to.

A row says how the program is started from the service's keys, where it answers, and what its metrics are called. Router,
autoscaling, dashboards, alerts and drain work from the row, and never name a runtime.
"""

import tomllib
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infra.spec.base import Misplaced, Name, Port, Spec

TABLE = Path(__file__).parents[1] / "catalog" / "runtimes.toml"
OWN = "slipway"
Api = Literal["openai", "kserve", "tensorflow"]
ModelFormat = Literal["huggingface", "onnx", "saved_model", "triton"]

PLACEHOLDERS: dict[str, str | None] = {
    "model": None,
    "served_name": None,
    "port": None,
    "metrics_port": None,
    "gpus": "gpus",
    "linger_s": None,
    "drain_s": "drain_s",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "max_queued_tokens": "max_queued_tokens",
    "kv_bytes": "kv_gib",
    "kv_bytes_per_gpu": "kv_gib",
    "kv_tokens": "kv_gib",
    "dtype": "dtype",
    "quantize": "quantize",
    "speculate_tokens": "speculate_tokens",
    "attention": "attention",
    "spill_bytes": "spill_gib",
    "files_dir": "files_claim",
    "api_keys": "api_keys_secret",
    "adapters": "adapters",
    "admin_host": None,
    "admin_port": None,
}
"""What a runtime's words may hold between braces → the key of the service that it says, where it is one."""
ALWAYS_THERE = frozenset(
    [
        "model",
        "served_name",
        "port",
        "linger_s",
        "drain_s",
        "max_num_seqs",
        "max_queued_tokens",
        "kv_bytes",
        "kv_bytes_per_gpu",
        "dtype",
    ]
)
"""Those with one value whatever the service says: the others stand in flags, which are left out, or said several times."""
UrlPath = Annotated[str, Field(pattern=r"^/[^{}\s]*$")]
ReadyPath = Annotated[str, Field(pattern=r"^/([^{}\s]|\{served_name\})*$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
MetricName = Annotated[str, Field(pattern=r"^[A-Za-z_:][A-Za-z0-9_:]*$")]
METRICS = (
    "slipway_serve_requests_running",
    "slipway_serve_requests_waiting",
    "slipway_serve_kv_used_ratio",
    "slipway_serve_ttft_seconds",
    "slipway_serve_tpot_seconds",
    "slipway_serve_itl_seconds",
    "slipway_serve_queue_seconds",
    "slipway_serve_prompt_tokens_total",
    "slipway_serve_output_tokens_total",
    "slipway_serve_preemptions_total",
    "slipway_serve_prefix_hit_tokens_total",
)
"""Meanings that a runtime's own metric can have (docs/contracts.md, Metrics)."""


class RuntimeMetrics(Spec):
    path: UrlPath = "/metrics"
    """Where they are read."""
    port: Port | None = None
    """Port of their own; null: the API's."""
    names: dict[str, MetricName] = Field(default={})
    """Slipway's name → the runtime's own name of a metric of the same kind and unit."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for name in self.names:
            if name not in METRICS:
                raise Misplaced(
                    f"{name!r} is no metric that a runtime can give; there is {', '.join(METRICS)}", "names"
                )
        return self


class Runtime(Spec):
    name: Name
    """Name that services refer to."""
    image: Annotated[str, Field(min_length=1)] | None = None
    """Container image; null: the stack's own server."""
    command: tuple[str, ...] = Field(min_length=1)
    """Program and its first words; `{model}`, `{port}` and the like stand for values of the service."""
    flags: dict[str, str] = Field(default={})
    """Flags and their values, left out where the service says nothing. A flag that ends in `=` is one word with its value."""
    env: dict[Variable, str] = Field(default={})
    """Environment variables."""
    files: dict[FileName, str] = Field(default={})
    """Files that are mounted at /runtime: name → text."""
    api: Api = "openai"
    """What it speaks: `openai` (/v1/chat/completions …), `kserve` (/v2/models/…/infer) or `tensorflow` (/v1/models/…:predict)."""
    model_format: ModelFormat = "huggingface"
    """What it loads: a Hugging Face directory, an ONNX graph, TensorFlow SavedModels or a Triton model repository."""
    port: Port = 8000
    """Port of the HTTP API."""
    live: UrlPath = "/health"
    """Path that answers 200 while the process works; it may be closed until the model is loaded."""
    ready: ReadyPath = "/health"
    """Path that answers 200 when a request would be answered now, and whatever it says within a second."""
    paths: Annotated[tuple[UrlPath, ...], Field(min_length=1)] = ("/v1/",)
    """Beginnings of the paths that the router passes on."""
    metrics: RuntimeMetrics = RuntimeMetrics()
    """What it measures."""
    follows_channel: bool = False
    """It opens the registry's channel itself and swaps models; else the model is copied before it starts, and a roll-out takes the next."""
    drains: bool = False
    """On SIGTERM it finishes the requests in flight; else the pod waits, out of the endpoints, for `drain_s` before SIGTERM."""
    needs_gpu: bool = False
    """It computes on GPUs only."""
    source: str
    """Where all of this is documented."""

    @model_validator(mode="after")
    def _placeholders_are_known(self) -> Self:
        for key, words in (("command", self.command), ("flags", tuple(self.flags.values()))):
            for word in words:
                for name in placeholders(word):
                    if name not in PLACEHOLDERS:
                        raise Misplaced(f"{{{name}}} stands for nothing; there is {', '.join(PLACEHOLDERS)}", key)
                    if key == "command" and name not in ALWAYS_THERE:
                        raise Misplaced(f"{{{name}}} may stand for nothing, or for several; put it in flags", key)
        if "metrics_port" in self.placeholders and self.metrics.port is None:
            raise Misplaced("{metrics_port} stands for metrics.port, which is not there", "flags")
        return self

    @property
    def placeholders(self) -> frozenset[str]:
        """What it is told of the service."""
        return frozenset(name for word in (*self.command, *self.flags.values()) for name in placeholders(word))

    @property
    def told(self) -> frozenset[str]:
        """Keys of the service that have an effect on it."""
        return frozenset(key for name in self.placeholders if (key := PLACEHOLDERS[name]))

    @property
    def counts_in_flight(self) -> bool:
        """Whether each replica says how many requests it holds; else the router counts them."""
        counted = {"slipway_serve_requests_running", "slipway_serve_requests_waiting"}
        return self.is_own or counted <= self.metrics.names.keys()

    @property
    def lingers(self) -> bool:
        """On SIGTERM it says first that it is not ready, and answers on; others refuse at once, and must be asked no more by then."""
        return "linger_s" in self.placeholders

    @property
    def is_own(self) -> bool:
        """Slipway's own server, which emits Slipway's metrics."""
        return self.image is None

    def emits(self, metric: str) -> bool:
        return self.is_own or metric in self.metrics.names


def placeholders(word: str) -> list[str]:
    """Names between braces."""
    return [name for _, name, _, _ in Formatter().parse(word) if name is not None]


@cache
def builtin() -> dict[str, Runtime]:
    """The runtimes that come with Slipway, by name."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["runtime"]
    return {name: Runtime.model_validate({"name": name, **row}) for name, row in rows.items()}
