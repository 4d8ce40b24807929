"""What the ranks send one another in a step, by collective: how often, how many bytes, how long it was under way.

The profiler sees every collective where it is made, whether by DDP, FSDP, DTensor or us. It costs time, so one step in
many is looked at: of a static model they are alike.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from torch.profiler import ProfilerActivity, profile

from trainer.log import Log

_BYTES = {
    "double": 8,
    "long int": 8,
    "float": 4,
    "int": 4,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "unsigned char": 1,
    "bool": 1,
}
_BACKENDS = ("gloo:", "nccl:", "memory::")


class Traffic:
    """Looks at the steps that `every_steps` divides, and at none where it is None. Rank 0's view is what is shown."""

    def __init__(self, *, every_steps: int | None, registry: CollectorRegistry, log: Log) -> None:
        self._every_steps, self._log = every_steps, log
        self.step: dict[str, dict[str, float]] = {}
        """Of the newest step that was looked at: `{collective: {"calls", "bytes", "seconds"}}`."""

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(f"slipway_train_communication_{name}", meaning, ["collective"], registry=registry)

        self._gauges = {
            "calls": gauge("calls", "Collectives that rank 0 took part in, in one step."),
            "bytes": gauge("bytes", "Bytes that rank 0 gave to them, in one step."),
            "seconds": gauge("seconds", "Time that they were under way, in one step; they overlap."),
        }

    @contextmanager
    def look(self, step: int) -> Iterator[None]:
        """Around everything that is sent for step number `step` + 1."""
        if self._every_steps is None or step % self._every_steps:
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it speaks of GPUs that are not there
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            yield
        assert profiler.profiler is not None
        assert profiler.profiler.kineto_results is not None
        self.step = _by_collective(profiler.profiler.kineto_results.events())
        self._log.emit("communication", step=step + 1, collectives=self.step)
        for collective, numbers in self.step.items():
            for name, value in numbers.items():
                self._gauges[name].labels(collective).set(value)


def _by_collective(events: list[Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"calls": 0, "bytes": 0, "seconds": 0.0})
    for event in events:
        backend = next((prefix for prefix in _BACKENDS if event.name().startswith(prefix)), None)
        if backend is None:
            continue
        numbers = found[event.name().removeprefix(backend)]
        numbers["calls"] += 1
        numbers["seconds"] += event.duration_ns() / 1e9
        for shape, kind in zip(event.shapes(), event.dtypes(), strict=False):
            count = 1
            for size in shape:
                count *= size
            numbers["bytes"] += count * _BYTES.get(kind, 0)
    return dict(found)
