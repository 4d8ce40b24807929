"""Story 6: alerts fire by the faults that they are for, in the cluster. `test_story_6_rules` has those that take longer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import SETTLED_S, slipway, until, write_stack
from tests.e2e.load import under_load
from tests.e2e.watching import Prometheus

Json = dict[str, Any]
FIRES_WITHIN_S = 400.0
SOON = {"after_s": 5}
# What fires within a minute of its fault; `test_story_6_rules` has the others, and how long each waits where nothing is said.
SOON_FIRED = (
    *("SlipwayNoReplicaReady", "SlipwayErrorBudgetBurning"),
    *("SlipwayAtMaxReplicas", "SlipwayTimeToFirstTokenHigh", "SlipwayTimePerTokenHigh"),
)
# Beside a second replica, which answers quickly and so most requests, a slow one is not seen in the slowest twentieth.
ALERTS = {"monitoring.alerts": dict.fromkeys(SOON_FIRED, SOON), "services.0.autoscaling.max_replicas": 1}
# Has the engine stand still for three seconds of each three and a half, for as long as the argument says.
ENGINES = """
import os, signal, sys, time
def engines():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"serving.engine" in file.read() and int(pid) != os.getpid():
                yield int(pid)
found = list(engines())
assert found, "no engine runs"
until = time.monotonic() + float(sys.argv[1])
try:
    while time.monotonic() < until:
        for what, for_s in ((signal.SIGSTOP, 3.0), (signal.SIGCONT, 0.5)):
            for pid in found:
                os.kill(pid, what)
            time.sleep(for_s)
finally:
    for pid in found:
        os.kill(pid, signal.SIGCONT)
"""


@pytest.fixture(scope="module")
def soon(settled: Json, kubeconfig: Path, project: Path) -> Iterator[None]:
    """The stack with alerts that wait for seconds where they would for minutes."""
    write_stack(project, ALERTS)
    slipway("apply", "-s", "dev", "--wait", str(SETTLED_S), cwd=project, kubeconfig=kubeconfig)
    yield
    write_stack(project, {})
    slipway("apply", "-s", "dev", "--wait", str(SETTLED_S), cwd=project, kubeconfig=kubeconfig)


@contextmanager
def no_node_for_the_server(kubectl: Callable[..., Any], namespace: str) -> Iterator[None]:
    """The only replica dies, and no node takes another."""
    node = kubectl("get", "nodes", "-o", "name").stdout.split()[0]
    kubectl("cordon", node)
    try:
        kubectl("-n", namespace, "delete", "pod", "-l", "app.kubernetes.io/component=serve", "--wait=false")
        yield
    finally:
        kubectl("uncordon", node)


@pytest.mark.usefixtures("soon")
def test_an_outage_is_told(prometheus: Prometheus, endpoint: str, kubectl: Callable[..., Any], namespace: str) -> None:
    """No replica is ready, and those who call hear 503: at the router alone, for there is no server to count them."""
    wanted = {"SlipwayNoReplicaReady", "SlipwayErrorBudgetBurning"}
    with no_node_for_the_server(kubectl, namespace), under_load(endpoint, model="pylib") as load:
        until(lambda: wanted <= prometheus.firing(), f"{wanted} do not fire", within_s=FIRES_WITHIN_S)
    assert load.failures
    kubectl("-n", namespace, "rollout", "status", "deployment/chat", "--timeout=900s")
    gone = "SlipwayNoReplicaReady"
    until(lambda: gone not in prometheus.firing(), f"{gone} fires on", within_s=FIRES_WITHIN_S)


@pytest.mark.usefixtures("soon")
def test_overload_and_a_slow_engine_are_told(
    prometheus: Prometheus, endpoint: str, kubectl: Callable[..., Any], namespace: str
) -> None:
    """More requests than the most replicas should hold; and an engine that stands still for most of the time."""
    wanted = {"SlipwayAtMaxReplicas", "SlipwayTimeToFirstTokenHigh", "SlipwayTimePerTokenHigh"}
    with under_load(endpoint, model="pylib", clients=40, max_tokens=4) as load:
        for _ in range(18):
            kubectl("-n", namespace, "exec", "deploy/chat", "--", "python", "-c", ENGINES, "20")
            if wanted <= prometheus.firing():
                break
        assert wanted <= prometheus.firing()
    assert load.failures == []
