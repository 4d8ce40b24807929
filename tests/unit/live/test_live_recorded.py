"""Snapshots of a real cluster (Kubernetes 1.36, one node): the stack `dev` without room for it, and without its images."""

import json
from pathlib import Path

import pytest

from infra.live import Line, Snapshot, explain

RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())


def lines(name: str) -> dict[str, Line]:
    """By kind and the part of the name before its digest."""
    return {"-".join(line.what.split("-")[:2]): line for line in explain(Snapshot(**RECORDED[name]))}


def test_without_room_every_pod_says_what_it_lacks() -> None:
    found = lines("no_capacity")
    assert found.keys() == {
        "job/data-pylib",
        "job/train-pylib",
        "job/promote-pylib",
        "deployment/chat",
        "deployment/router",
    }
    for line in found.values():
        assert line.state == "waiting"
        assert "it asks for 500m of cpu, and no node has as much free" in line.says[0]
        assert "preemption" not in line.says[0]
    assert found["job/train-pylib"].says[0].endswith("(2 pods)")
    assert "unable to get metric slipway_serve_requests_in_flight" in found["deployment/chat"].says[1]


@pytest.mark.parametrize("what", ["job/data-pylib", "deployment/chat", "deployment/router"])
def test_without_its_image_a_workload_fails_and_names_it(what: str) -> None:
    line = lines("no_image")[what]
    assert line.state == "failing"
    assert "cannot be pulled: the registry does not answer from the node; load the image" in line.says[0]
