"""What a person is told of pods that do not run: another stack beside `dev`, which finds a taint, no room, no image, no volume, a
quota."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ROOT, slipway, until, write_stack

Json = dict[str, Any]
Said = Callable[[str], str]
NOWHERE = "localhost/nowhere:1"


def namespace_of(test: Callable[..., None]) -> str:
    return test.__name__.replace("_", "-")


@pytest.fixture
def beside(
    request: pytest.FixtureRequest, kubeconfig: Path, kubectl: Callable[..., Any], tmp_path: Path
) -> Iterator[Callable[[Json], Said]]:
    """Brings `dev` with changes to a namespace of its own; the function returned tells what `slipway status` says of a workload."""
    namespace = namespace_of(request.function)
    (tmp_path / "stacks").mkdir()
    (tmp_path / "Pulumi.yaml").write_text((ROOT / "Pulumi.yaml").read_text())

    def said(what: str) -> str:
        done = slipway("status", "-s", "dev", "--no-drift", "--json", cwd=tmp_path, kubeconfig=kubeconfig, check=False)
        lines = [line for line in json.loads(done.stdout)["workloads"] if line["what"].startswith(what)]
        return " · ".join(text for line in lines for text in line["says"])

    def bring(changes: Json) -> Said:
        write_stack(tmp_path, {"platform.namespace": namespace} | changes)
        slipway("apply", "-s", "dev", cwd=tmp_path, kubeconfig=kubeconfig)
        return said

    yield bring
    kubectl("delete", "namespace", namespace, "--wait=false")


def test_a_taint_no_room_and_no_image(beside: Callable[[Json], Said], kubectl: Callable[..., Any]) -> None:
    node = kubectl("get", "nodes", "-o", "name").stdout.split()[0].removeprefix("node/")
    large = {"training.resources": {"cpus": 1.9, "memory_gib": 1.5}}
    kubectl("taint", "node", node, "team=other:NoSchedule")
    try:
        said = beside(large | {"images": {"serving": NOWHERE}})
        until(lambda: "taint team: other keeps it out" in said("deployment/chat"), "no taint is told")
    finally:
        kubectl("taint", "node", node, "team-")
    until(lambda: "no capacity (1 node): it asks for 1900m of cpu" in said("job/train"), "no want of room is told")
    until(lambda: f"image {NOWHERE} cannot be pulled" in said("deployment/chat"), "no want of an image is told")


def test_no_volume(beside: Callable[[Json], Said]) -> None:
    said = beside({"storage.class_name": "nowhere"})
    until(lambda: '"nowhere" not found; mend storage.class_name' in said("volume/runs"), "no want of a class is told")
    until(lambda: "volume 'runs' is not bound" in said("job/train"), "the pods do not say it")


def test_a_quota(beside: Callable[[Json], Said], kubectl: Callable[..., Any]) -> None:
    """Not the stack's own, which is judged before anything is created: somebody else's, in the same namespace."""
    namespace = namespace_of(test_a_quota)
    kubectl("create", "namespace", namespace)
    kubectl("-n", namespace, "create", "quota", "tight", "--hard=pods=1")
    said = beside({})
    until(lambda: "quota 'tight' keeps it out" in said("job/train"), "no quota is told")
    assert "pods: all of 1 used" in said("quota/tight")
