"""An engine that has work and does not move is not counted on, however seldom or often one looks."""

import pickle
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.messages import Counters, Step
from serving.pulse import SILENT_S, Pulse


@dataclass
class Engine:
    in_flight: int = 0
    counters: Counters = field(default_factory=Counters)


STEPS = st.lists(st.tuples(st.floats(0.1, 100), st.sampled_from(["steps", "idles", "hangs"])), max_size=20)


@given(history=STEPS)
def test_only_work_that_stands_still_for_long_is_lost(history: list[tuple[float, str]]) -> None:
    now_s, stuck_s = 0.0, None
    engine = Engine()
    pulse = Pulse(clock=lambda: now_s)
    for seconds, what in history:
        now_s += seconds
        if what == "steps":
            engine.in_flight, engine.counters = 1, Counters(output_tokens=1)
        else:
            engine.in_flight = int(what == "hangs")
        lost = pulse.is_lost(engine)  # type: ignore[arg-type]
        stuck_s = (now_s if stuck_s is None else stuck_s) if what == "hangs" else None
        assert not lost or (stuck_s is not None and now_s - stuck_s >= SILENT_S)
    for _ in range(3):
        now_s, engine.in_flight = now_s + SILENT_S, 1
        lost = pulse.is_lost(engine)  # type: ignore[arg-type]
    assert lost


def test_each_step_brings_counters_of_its_own() -> None:
    """By which the pulse is felt, also when nothing was counted."""
    engine, now_s = Engine(in_flight=1), 0.0
    pulse = Pulse(clock=lambda: now_s)
    wire = pickle.dumps(Step([], 1, 0, 0.5))
    for _ in range(5):
        now_s += SILENT_S
        engine.counters = pickle.loads(wire).counters
        assert not pulse.is_lost(engine)  # type: ignore[arg-type]
