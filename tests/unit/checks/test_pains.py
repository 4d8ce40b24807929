"""What users of other systems ran into is a check or a default here: docs/checks.md says which, and this holds it to that."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from infra.checks import CODES, Refused
from infra.components.autoscaler import METRIC
from infra.render import Rendered, run
from infra.spec import NodePool, Stack, load

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "checks.md").read_text()
Json = dict[str, Any]


@cache
def shipped(name: str) -> Rendered:
    return run(ROOT / "stacks" / f"Pulumi.{name}.yaml")


def kind(name: str, kind: str) -> list[Json]:
    return [manifest for manifest in shipped(name).manifests if manifest["kind"] == kind]


def test_every_row_names_tests_and_codes_that_exist() -> None:
    tests = {
        name for file in ROOT.glob("tests/**/*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    table = DOCS.partition("## What users")[2]
    assert set(re.findall(r"`(test_\w+)`", table)) - tests == set()
    assert set(re.findall(r"SLW\d{3}", DOCS)) == set(CODES)
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in table.splitlines()
        if row.startswith("| ") and "---" not in row
    ]
    assert len(rows) > 20
    assert all(row[2] or "`test_" in row[3] for row in rows[1:])


@pytest.mark.parametrize("nodes", [0, -1])
def test_a_count_below_one_is_refused_by_type(changed: Callable[..., Path], nodes: int) -> None:
    with pytest.raises(ValueError, match=r"training\.nodes: must be at least 1"):
        load(changed("prod", {"training.nodes": nodes}))
    with pytest.raises(ValidationError):
        NodePool(name="x", instance="cpu", max_nodes=nodes)


@pytest.mark.parametrize("name", ["dev", "staging", "prod"])
def test_the_metric_chain_is_closed(name: str) -> None:
    """Emitted by the server, scraped from each replica, and named so in the autoscaler."""
    (scaler,) = kind(name, "HorizontalPodAutoscaler")
    (named,) = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    assert named == METRIC
    emitted = (ROOT / "serving" / "metrics.py").read_text()
    assert named in emitted or named.removeprefix("slipway_serve_") in emitted
    (monitor,) = [m for m in kind(name, "ServiceMonitor") if m["metadata"]["name"] == "chat"]
    assert {endpoint["path"] for endpoint in monitor["spec"]["endpoints"]} == {"/metrics"}
    policies = {policy["metadata"]["name"] for policy in kind(name, "NetworkPolicy")}
    assert "monitoring-scrapes-serve" in policies


@pytest.mark.parametrize("name", ["local", "prod"])
def test_no_probe_has_a_fixed_delay(name: str) -> None:
    for manifest in kind(name, "Deployment"):
        for container in manifest["spec"]["template"]["spec"]["containers"]:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert "initialDelaySeconds" not in container.get(probe, {})


def test_the_router_sees_ready_replicas_only() -> None:
    services = {service["metadata"]["name"]: service["spec"] for service in kind("prod", "Service")}
    assert services["chat-pods"]["clusterIP"] == "None"
    assert "publishNotReadyAddresses" not in services["chat-pods"]


def test_checks_need_no_cluster(changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error stops the program before the first resource, and names the key of the stack file."""
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    with pytest.raises(Refused) as refused:
        run(changed("prod", {"training.nodes": 9, "services.0.gpus": 7}))
    assert {(f.code, f.where) for f in refused.value.findings if f.severity == "error"} >= {
        ("SLW101", "training.nodes"),
        ("SLW104", "services.chat.resources"),
    }


def test_an_image_on_the_node_is_not_pulled_again() -> None:
    for manifest in kind("prod", "Deployment"):
        for container in manifest["spec"]["template"]["spec"]["containers"]:
            assert container["imagePullPolicy"] == "IfNotPresent"


def test_a_stack_whose_checks_are_all_off_is_still_typed(changed: Callable[..., Path]) -> None:
    spec = load(changed("prod", {"checks": dict.fromkeys(CODES, "off"), "training.nodes": 9}))
    assert isinstance(spec, Stack)
    assert run(
        changed("prod", {"checks": {"SLW101": "off"}, "training.nodes": 9, "budget": {}, "training.global_batch": 288})
    )
