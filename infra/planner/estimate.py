"""What every estimate is: a value with its unit, what it is made of, and what was assumed."""

from dataclasses import dataclass, field

GIB = 2**30
MARGIN = 0.95
"""Share of a memory that an estimate may fill: what the estimates err by, and what allocators lose."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    value: float
    unit: str
    parts: dict[str, float] = field(default_factory=dict[str, float])
    """What the value is made of, in the same unit; for a sum, the parts add up to it."""
    assumptions: tuple[str, ...] = ()
    """What was taken for granted, each with its source."""


def total(unit: str, parts: dict[str, float], *assumptions: str) -> Estimate:
    """The estimate that is the sum of its parts."""
    return Estimate(value=sum(parts.values()), unit=unit, parts=parts, assumptions=assumptions)
