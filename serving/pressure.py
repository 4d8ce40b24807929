"""Memory pressure: while free memory is below the floor new requests are refused, so that those running can finish.

A server that goes on taking requests is ended by the kernel in the end, and every stream with it.
"""

import time

from serving import logs
from serving.memory import available_bytes

LOOK_AGAIN_S = 0.25
RECOVERED = 1.25  # of the floor: pressure ends above this, so that it does not come and go with every request


class MemoryWatch:
    def __init__(self, floor_bytes: int) -> None:
        self.floor_bytes = floor_bytes
        self.short = False
        self.free_bytes = available_bytes()
        self._next_look_s = 0.0

    def look(self) -> bool:
        """True while memory is short. Asks the system at most four times a second."""
        if time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + LOOK_AGAIN_S
            self.free_bytes = available_bytes()
            short = self.free_bytes < self.floor_bytes * (RECOVERED if self.short else 1.0)
            if short != self.short:
                self.short = short
                level = "warning" if short else "info"
                logs.event("memory", level=level, short=short, free_bytes=self.free_bytes, floor_bytes=self.floor_bytes)
        return self.short
