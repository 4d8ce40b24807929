"""Who is admitted next: the highest priority, and within it the tenant that has had the fewest tokens.

A tenant that comes back after a pause starts level with the one that has had the least of those still here, so that
idle time is not saved up. (The virtual token counter of arXiv 2401.00588.)
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain

from serving.engine.sequence import Sequence


class FairQueue:
    """Sequences that wait, and the books on all that are here, waiting or running."""

    def __init__(self) -> None:
        self._waiting: dict[Sequence, None] = {}  # in the order of arrival
        self._preempted: list[Sequence] = []  # these hold answers half made: of their priority they come first
        self._present: Counter[str] = Counter()  # sequences of each tenant
        self._tokens: dict[str, int] = {}  # that each tenant present has had

    def __len__(self) -> int:
        return len(self._waiting) + len(self._preempted)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(reversed(self._preempted), self._waiting)

    def add(self, seq: Sequence) -> None:
        if not self._present[seq.tenant]:
            self._tokens[seq.tenant] = min(self._tokens.values(), default=0)
        self._present[seq.tenant] += 1
        self._waiting[seq] = None

    def put_back(self, seq: Sequence) -> None:
        """A preempted sequence: the youngest is thrown out first, so of one priority the last to come is the oldest."""
        self._preempted.append(seq)

    def first(self) -> Sequence:
        found = self.first_of(lambda _: True)
        assert found is not None, "the queue is empty"
        return found

    def first_of(self, fits: Callable[[Sequence], bool]) -> Sequence | None:
        """The first of those that `fits` says yes to."""
        again = max(filter(fits, reversed(self._preempted)), key=lambda seq: seq.priority, default=None)
        new = min(filter(fits, self._waiting), key=self._rank, default=None)
        return new if again is None or (new is not None and new.priority > again.priority) else again

    def _rank(self, seq: Sequence) -> tuple[int, int]:
        return -seq.priority, self._tokens[seq.tenant]

    def remove(self, seq: Sequence) -> None:
        if seq in self._waiting:
            del self._waiting[seq]
        else:
            self._preempted.remove(seq)

    def charge(self, seq: Sequence, num_tokens: int) -> None:
        self._tokens[seq.tenant] += num_tokens

    def forget(self, seq: Sequence) -> None:
        """The sequence has left the engine."""
        self._present[seq.tenant] -= 1
        if not self._present[seq.tenant]:
            del self._present[seq.tenant], self._tokens[seq.tenant]
