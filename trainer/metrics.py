"""What Prometheus sees of a training run: the names are a contract (docs/contracts.md)."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from trainer.errors import Refused

_OF_ROW = {
    "loss": ("loss", "Cross-entropy of the last logged step, nats a token, mean over the global batch."),
    "lr": ("learning_rate", "Learning rate of the last logged step."),
    "tokens_per_s": ("tokens_per_second", "Tokens a second over all ranks, since the last log."),
    "grad_norm": ("grad_norm", "Norm of all gradients before clipping."),
    "step_s": ("step_seconds", "Mean time of a step, without checkpoints."),
    "tokens_per_s_per_rank": ("tokens_per_second_per_rank", "Tokens a second of one rank."),
    "data_wait_ratio": ("data_wait_ratio", "Share of the time in which the step waited for its data."),
    "memory_peak_bytes": ("memory_peak_bytes", "Most memory in use on rank 0: of its GPU, or of its process."),
    "memory_reserved_peak_bytes": ("memory_reserved_peak_bytes", "Most memory held by the GPU's allocator."),
    "goodput_ratio": ("goodput_ratio", "Time of steps that count, of all time since the run first began."),
    "mfu_ratio": ("mfu_ratio", "Model FLOPs of all there could be (PaLM, appendix B)."),
    "hfu_ratio": ("hfu_ratio", "The same with what is computed twice."),
    "step_to_planned_ratio": ("step_to_planned_ratio", "Mean time of a step, to the planner's."),
    "memory_to_planned_ratio": ("memory_to_planned_ratio", "Most memory in use, to the planner's."),
}
"""By the names of a row of log.jsonl. What a run has no numbers for stays out."""
_AT_ONCE = ("loss", "lr", "tokens_per_s", "grad_norm")


class TrainMetrics:
    """The gauges of rank 0. `serve` opens METRICS_PORT when the environment names one."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._of_row = {name: self._gauge(*_OF_ROW[name]) for name in _AT_ONCE}
        self.step = self._gauge("step", "Optimizer steps done.")
        self.steps = self._gauge("steps", "Optimizer steps of the whole run.")
        self.tokens = Counter(
            "slipway_train_tokens", "Tokens trained on by this process group.", registry=self.registry
        )
        self.checkpoint_seconds = self._gauge("checkpoint_seconds", "Time that the last checkpoint took.")
        self.last_checkpoint_step = self._gauge("last_checkpoint_step", "Step of the newest checkpoint.")

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(f"slipway_train_{name}", meaning, registry=self.registry)

    def show(self, row: dict[str, float]) -> None:
        """Sets what a row of the log says."""
        for name, about in _OF_ROW.items():
            if name in row:
                self._of_row[name] = self._of_row.get(name) or self._gauge(*about)
                self._of_row[name].set(row[name])

    def serve(self) -> None:
        """Raises Refused when the port is no port or taken."""
        port = os.environ.get("METRICS_PORT")
        if not port:
            return
        host = os.environ.get("METRICS_HOST", "0.0.0.0")  # noqa: S104 - a pod is scraped from outside of it
        try:
            start_http_server(int(port), addr=host, registry=self.registry)
        except (OSError, OverflowError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            fix = "Set METRICS_PORT to a free port, or unset it."
            raise Refused(f"cannot serve metrics: {reason}", where=f"METRICS_PORT={port}", fix=fix) from None
