"""What interruptions cost a run, and how often to save: Young 1974 and Daly 2006.

With mean time between interruptions M of the whole gang, a save of δ seconds and a restart of R seconds, T seconds of work in pieces
of τ seconds take M·e^(R/M)·(e^((τ+δ)/M) − 1)·T/τ (Daly 2006, eq. 13), which is least near τ = √(2δM) (Young 1974).
"""

import math
from dataclasses import dataclass

SAVE_GBPS = 1.0
"""GB/s at which a node writes a checkpoint to shared storage (assumption; EFS and Filestore give about that to one client)."""

RESTART_S = 600.0
"""From an interruption to the next step: a node of 280 s, its start of 125 s, image, rendezvous and reading the checkpoint."""

OPTIMIZER_BYTES = 12
"""Bytes a parameter holds in a checkpoint: fp32 weight and two moments."""


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    hours: float
    """Wall-clock time with saves and interruptions; infinite where the run hardly ever gets from one save to the next."""
    interruptions: float
    """Expected number."""
    best_interval_s: float
    """Young's interval between saves."""


def save_s(*, parameters: float, nodes: int) -> float:
    """Seconds to write a checkpoint, all nodes writing their share."""
    return parameters * OPTIMIZER_BYTES / (SAVE_GBPS * 1e9 * nodes)


def best_interval_s(*, save: float, mean_between_s: float) -> float:
    """Young's interval √(2δM), and never below the save itself."""
    return max(math.sqrt(2 * save * mean_between_s), save)


def interrupted(*, hours: float, interval_s: float, save: float, rate_per_h: float) -> Interrupted:
    """`hours` of work under `rate_per_h` interruptions of the whole gang, saved every `interval_s` seconds of work."""
    if rate_per_h <= 0:
        with_saves = hours * (1 + save / interval_s)
        return Interrupted(hours=with_saves, interruptions=0.0, best_interval_s=hours * 3600)
    mean = 3600 / rate_per_h
    exponent = (min(interval_s, hours * 3600) + save) / mean
    wall = (
        mean
        * math.exp(min(RESTART_S / mean, 700))
        * math.expm1(exponent)
        * hours
        * 3600
        / min(interval_s, hours * 3600)
        if exponent < 700
        else math.inf
    )
    return Interrupted(
        hours=wall / 3600,
        interruptions=wall / mean,
        best_interval_s=best_interval_s(save=save, mean_between_s=mean),
    )
