"""What a failed pod means to its Job, and how long a restart waits."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.local.jobs import failure_action
from infra.local.pod import FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S, PodExit, back_off_s


def rule(action: str, operator: str, *values: int, **rest: str) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"operator": operator, "values": list(values), **rest}}


POLICY = {
    "rules": [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        rule("FailJob", "In", 2, containerName="trainer"),
        rule("Ignore", "In", 75),
        rule("FailIndex", "NotIn", 1, 137),
    ]
}


@pytest.mark.parametrize(
    ("codes", "action"),
    [
        ({"trainer": 2}, "FailJob"),
        ({"trainer": 75}, "Ignore"),
        ({"trainer": 0, "side": 75}, "Ignore"),
        ({"side": 2}, "FailIndex"),
        ({"trainer": 1}, "Count"),
        ({"trainer": 137, "side": 0}, "Count"),
    ],
)
def test_the_first_rule_that_matches_decides(codes: dict[str, int], action: str):
    assert failure_action(POLICY, PodExit(codes, "")) == action


def test_without_a_policy_every_failure_counts():
    assert failure_action({}, PodExit({"trainer": 2}, "")) == "Count"


@given(st.integers(1, 10_000))
def test_back_off_grows_and_is_bounded(failures: int):
    assert FIRST_BACK_OFF_S <= back_off_s(failures) <= back_off_s(failures + 1) <= LONGEST_BACK_OFF_S
