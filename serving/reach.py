"""Whether a store that is not this server's own can be reached: said in the log when that changes, and counted.

Without the store the server goes on, so that nobody would know of it otherwise.
"""

from serving import logs


class Reach:
    def __init__(self, store: str) -> None:
        self.store, self.away, self.failures = store, False, 0

    def failed(self, error: Exception) -> None:
        self.failures += 1
        if not self.away:
            self.away = True
            logs.event("store_away", level="warning", store=self.store, message=str(error))

    def answered(self) -> None:
        if self.away:
            self.away = False
            logs.event("store_back", store=self.store, failures=self.failures)
