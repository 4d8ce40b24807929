"""Story 6: what is declared to be watched is watched, by a real Prometheus: targets, rules, panels."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.apply import Cluster
from infra.live.endpoint import endpoint as router_of
from tests.e2e.conftest import forwarded, slipway, until, write_stack
from tests.e2e.load import under_load
from tests.e2e.watching import Prometheus

Json = dict[str, Any]
SEEN_WITHIN_S = 400.0
LONG = {"training.steps": 100_000, "training.checkpoint": {"every_steps": 5, "keep": 2}}
"""A training that is under way for as long as it is looked at."""


@pytest.fixture(scope="module")
def watched(settled: Json, cluster: Cluster, kubeconfig: Path, project: Path, namespace: str) -> Iterator[Prometheus]:
    """Prometheus, while the stack trains and answers."""
    write_stack(project, LONG)
    slipway("apply", "-s", "dev", cwd=project, kubeconfig=kubeconfig)
    with (
        forwarded(cluster, "monitoring", "prometheus-operated", 9090) as url,
        router_of(cluster, namespace=namespace) as endpoint,
        under_load(endpoint, model="pylib", clients=2, max_tokens=16),
    ):
        yield Prometheus(url)
    write_stack(project, {})
    slipway("apply", "-s", "dev", cwd=project, kubeconfig=kubeconfig)


def test_every_target_is_up(watched: Prometheus, cluster: Cluster, namespace: str) -> None:
    group = f"/apis/monitoring.coreos.com/v1/namespaces/{namespace}"
    monitors = {
        f"{kind[:-1]}/{namespace}/{one['metadata']['name']}/0".lower()
        for kind in ("serviceMonitors", "podMonitors")
        for one in cluster.get(f"{group}/{kind.lower()}")["items"]
    }
    assert len(monitors) == 3

    def all_up() -> bool:
        targets = watched.targets(namespace)
        up = {one["scrapePool"].lower() for one in targets if one["health"] == "up"}
        return up == monitors and all(one["health"] == "up" for one in targets)

    until(all_up, "not every target is up", within_s=SEEN_WITHIN_S)


def test_every_rule_is_loaded_and_evaluates(watched: Prometheus, cluster: Cluster, namespace: str) -> None:
    path = f"/apis/monitoring.coreos.com/v1/namespaces/{namespace}/prometheusrules/objectives"
    declared = {rule["alert"] for group in cluster.get(path)["spec"]["groups"] for rule in group["rules"]}

    def all_well() -> bool:
        return {rule["name"] for rule in watched.rules() if rule["health"] == "ok"} == declared

    until(all_well, "not every rule is evaluated", within_s=SEEN_WITHIN_S)
    assert [rule for rule in watched.rules() if rule.get("lastError")] == []


def queries(board: Json) -> Iterator[tuple[str, str]]:
    """(panel, PromQL) of a dashboard."""
    for panel in board["panels"]:
        yield from queries(panel) if panel.get("panels") else ()
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def test_every_panel_has_data(watched: Prometheus, cluster: Cluster, namespace: str) -> None:
    boards = cluster.get(f"/api/v1/namespaces/{namespace}/configmaps", labelSelector="grafana_dashboard=1")["items"]
    asked = [found for one in boards for text in one["data"].values() for found in queries(json.loads(text))]
    assert len(boards) == 2
    assert len(asked) > 15
    empty: list[tuple[str, str]] = []

    def none_is_empty() -> bool:
        empty[:] = [(panel, query) for panel, query in asked if not has_a_number(watched, query)]
        return not empty

    try:
        until(none_is_empty, "panels without data", within_s=SEEN_WITHIN_S)
    except AssertionError:
        pytest.fail(f"without data: {empty}")


def has_a_number(prometheus: Prometheus, query: str) -> bool:
    return any(sample["value"][1] != "NaN" for sample in prometheus.query(query))
