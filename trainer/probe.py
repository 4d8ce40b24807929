"""Looking into a run while it runs: `kill -USR1` a rank for a trace of its next steps, `-USR2` for its memory.

They go to `run/profile/`: a trace that Perfetto and chrome://tracing open, and for a GPU a snapshot that
pytorch.org/memory_viz opens; on a CPU the trace has the memory of each operation.
"""

import signal
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.log import Log

STEPS = 5


class Probe:
    """Waits for the two signals while it is entered; `before_step` does what they asked for."""

    def __init__(self, run: Path, *, rank: int, device: torch.device, log: Log) -> None:
        self._directory, self._rank, self._cuda, self._log = run / "profile", rank, device.type == "cuda", log
        self._asked: set[str] = set()
        self._trace: profile | None = None
        self._until = 0
        self._recording = False

    def __enter__(self) -> Self:
        asks = {signal.SIGUSR1: "trace", signal.SIGUSR2: "memory"}
        self._before = {number: signal.signal(number, self._note) for number in asks}
        self._asks = asks
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _where: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._trace is not None:
            self._trace.stop()

    def _note(self, number: int, _frame: Any) -> None:
        self._asked.add(self._asks[signal.Signals(number)])

    def before_step(self, step: int) -> None:
        """Begins what was asked for, and ends it STEPS steps later."""
        if self._until and step >= self._until:
            self._end(step)
        if self._asked and not self._until:
            self._begin(step)

    def _begin(self, step: int) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        memory = "memory" in self._asked
        if memory and self._cuda:
            torch.cuda.memory._record_memory_history()
            self._recording = True
        if "trace" in self._asked or not self._cuda:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._trace = profile(activities=activities, profile_memory=memory, record_shapes=True)
            self._trace.start()
        self._asked.clear()
        self._until = step + STEPS

    def _end(self, step: int) -> None:
        name = f"step-{step:08d}-rank-{self._rank}"
        if self._trace is not None:
            self._trace.stop()
            path = self._directory / f"{name}.trace.json.gz"
            self._trace.export_chrome_trace(str(path))
            self._log.emit("artifact", kind="trace", path=str(path))
            self._trace = None
        if self._recording:
            path = self._directory / f"{name}.memory.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            self._log.emit("artifact", kind="memory", path=str(path))
            self._recording = False
        self._until = 0
