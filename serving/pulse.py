"""Whether the engine moves. One that is frozen, or that waits for its device for ever, is alive and answers nobody."""

import time
from collections.abc import Callable

from serving.engine.client import EngineProcess

SILENT_S = 30.0  # longer than any step, which chunks of prompts keep short


class Pulse:
    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._step: object = None
        self._since_s: float | None = None  # when it was first seen to have work, and no step taken since

    def is_lost(self, engine: EngineProcess) -> bool:
        """True when the engine has had work for so long and took no step. Probes ask often enough for that to be seen."""
        step = engine.counters  # others with each step
        if engine.in_flight == 0 or step is not self._step:
            self._step, self._since_s = step, None
        elif self._since_s is None:
            self._since_s = self._clock()
        return self._since_s is not None and self._clock() - self._since_s >= SILENT_S
