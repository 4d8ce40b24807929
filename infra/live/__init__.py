"""A stack on a live cluster, in people's words: what runs, what waits and why, where it differs from what was declared."""

from infra.live.drift import Difference, differences
from infra.live.explain import Line, explain
from infra.live.forward import forwarded
from infra.live.scrape import Training, training_of
from infra.live.snapshot import Snapshot, snapshot

__all__ = [
    "Difference",
    "Line",
    "Snapshot",
    "Training",
    "differences",
    "explain",
    "forwarded",
    "snapshot",
    "training_of",
]
