"""At the end: the stack goes without its volumes, then with them; the cluster leaves the machine as it was, cut off or not."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from infra.apply import Cluster
from infra.clouds.local import Places, kind
from tests.e2e.conftest import KEPT, ROOT, SLIPWAY, STATE, slipway
from tests.e2e.machine_state import Snapshot, difference, snapshot

Json = dict[str, Any]


def test_destroy_keeps_what_was_made(
    settled: Json, kubeconfig: Path, project: Path, cluster: Cluster, namespace: str
) -> None:
    slipway("destroy", "-s", "dev", cwd=project, kubeconfig=kubeconfig)
    assert cluster.get(f"/apis/apps/v1/namespaces/{namespace}/deployments")["items"] == []
    claims = cluster.get(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims")["items"]
    assert {claim["metadata"]["name"] for claim in claims} == {"data", "runs", "registry"}


def test_destroy_with_volumes_removes_all(
    settled: Json, kubeconfig: Path, project: Path, cluster: Cluster, namespace: str
) -> None:
    slipway("destroy", "-s", "dev", "--volumes", cwd=project, kubeconfig=kubeconfig)
    spaces = {space["metadata"]["name"] for space in cluster.get("/api/v1/namespaces")["items"]}
    assert namespace not in spaces


@pytest.mark.skipif(KEPT, reason="SLIPWAY_E2E_KEEP=1: the cluster is kept")
def test_down_leaves_no_trace(kubeconfig: Path) -> None:
    assert json.loads(slipway("cluster", "down", "--json").stdout) == {"was_there": True}
    places = Places.of_user()
    assert not places.state.exists()
    left = snapshot()
    assert not left["processes"]
    assert not left["cgroups"]
    assert not [name for name in left["interfaces"] if name.startswith("slipway")]
    assert not [point for point in left["mounts"] if "slipway" in point]
    assert not [rule for rule in left["rules"] if "slipway" in rule or "kube" in rule]
    assert json.loads(slipway("cluster", "down", "--json").stdout) == {"was_there": False}


@pytest.fixture(scope="module")
def clean(kubeconfig: Path) -> Snapshot:
    """The machine without a cluster."""
    if KEPT:
        pytest.skip("SLIPWAY_E2E_KEEP=1: the cluster is kept")
    if kind.is_possible():
        pytest.skip("the cluster is kind's: what it leaves is Docker's")
    slipway("cluster", "down")
    shutil.rmtree(STATE / "pulumi", ignore_errors=True)  # of a stack that is gone; who is ended below takes it along
    return snapshot()


@pytest.fixture(scope="module")
def up_takes_s(clean: Snapshot) -> float:
    """A whole `up`, whose `down` leaves the machine as it was."""
    started = time.monotonic()
    slipway("cluster", "up")
    took = time.monotonic() - started
    slipway("cluster", "down")
    assert difference(clean, snapshot()) == {}
    return took


@pytest.mark.parametrize("seed", range(3))
def test_down_after_an_up_that_was_killed(clean: Snapshot, up_takes_s: float, seed: int) -> None:
    after_s = Random(seed).uniform(0.5, up_takes_s)
    killed("cluster", "up", after_s=after_s)
    slipway("cluster", "down")
    assert difference(clean, snapshot()) == {}, f"killed {after_s:.2f} s after its start"


@pytest.mark.parametrize("seed", range(2))
def test_down_after_a_down_that_was_killed(clean: Snapshot, up_takes_s: float, seed: int) -> None:
    slipway("cluster", "up")
    after_s = Random(seed).uniform(0.3, 2.0)
    killed("cluster", "down", after_s=after_s)
    slipway("cluster", "down")
    assert difference(clean, snapshot()) == {}, f"killed {after_s:.2f} s after its start"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_of_tests_that_is_ended_takes_its_cluster_along(clean: Snapshot, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/e2e/test_own_cluster.py"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr
        said = next((line for line in run.stderr if "waiting for the API server" in line), None)
        run.send_signal(how)
        run.communicate()
    assert said, "no cluster was begun"
    assert difference(clean, snapshot()) == {}


def killed(*words: str, after_s: float) -> None:
    """Run the command, and kill it `after_s` after its start: it alone, as the kernel does that is out of memory."""
    with subprocess.Popen([SLIPWAY, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            process.kill()
