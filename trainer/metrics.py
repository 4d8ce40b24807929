"""What Prometheus sees of a training run: the names are a contract (docs/contracts.md)."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from trainer.errors import Refused


class TrainMetrics:
    """The gauges of rank 0. `serve` opens METRICS_PORT when the environment names one."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(f"slipway_train_{name}", meaning, registry=registry)

        self.loss = gauge("loss", "Cross-entropy of the last logged step, nats a token, mean over the global batch.")
        self.step = gauge("step", "Optimizer steps done.")
        self.steps = gauge("steps", "Optimizer steps of the whole run.")
        self.tokens = Counter("slipway_train_tokens", "Tokens trained on by this process group.", registry=registry)
        self.tokens_per_second = gauge("tokens_per_second", "Tokens a second over all ranks, since the last log.")
        self.grad_norm = gauge("grad_norm", "Norm of all gradients before clipping.")
        self.learning_rate = gauge("learning_rate", "Learning rate of the last logged step.")
        self.checkpoint_seconds = gauge("checkpoint_seconds", "Time that the last checkpoint took.")
        self.last_checkpoint_step = gauge("last_checkpoint_step", "Step of the newest checkpoint.")

    def show(self, *, step: int, loss: float, lr: float, tokens_per_s: float, grad_norm: float) -> None:
        """Sets what a log line says."""
        self.step.set(step)
        self.loss.set(loss)
        self.learning_rate.set(lr)
        self.tokens_per_second.set(tokens_per_s)
        self.grad_norm.set(grad_norm)

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
