"""Story 6, the rules alone: each alert fires by its fault after its time, and never while all is well. By promtool."""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.clouds.local import Places, Unable, debian
from tests.e2e.conftest import slipway

Json = dict[str, Any]
NAMESPACE = "slipway-dev"
SERVICE = f'namespace="{NAMESPACE}", inference_service="chat", pod="chat-0"'
TRAIN = f'namespace="{NAMESPACE}", pod="train-0"'
ROUTER = f'namespace="{NAMESPACE}", pod="router-0", envoy_cluster_name="chat"'
HEALTHY = {
    f"slipway_serve_ready{{{SERVICE}}}": "1x120",
    f"slipway_serve_requests_in_flight{{{SERVICE}}}": "2x120",
    f'slipway_serve_requests_total{{{SERVICE}, outcome="stop"}}': "0+60x120",
    f'slipway_serve_requests_total{{{SERVICE}, outcome="error"}}': "0x120",
    f"envoy_cluster_upstream_cx_none_healthy{{{ROUTER}}}": "0x120",
    f'slipway_serve_ttft_seconds_bucket{{{SERVICE}, le="0.5"}}': "0+60x120",
    f'slipway_serve_ttft_seconds_bucket{{{SERVICE}, le="10"}}': "0+60x120",
    f'slipway_serve_ttft_seconds_bucket{{{SERVICE}, le="+Inf"}}': "0+60x120",
    f'slipway_serve_tpot_seconds_bucket{{{SERVICE}, le="0.05"}}': "0+60x120",
    f'slipway_serve_tpot_seconds_bucket{{{SERVICE}, le="1"}}': "0+60x120",
    f'slipway_serve_tpot_seconds_bucket{{{SERVICE}, le="+Inf"}}': "0+60x120",
    f"slipway_train_step{{{TRAIN}}}": "0+10x120",
    f"slipway_train_last_checkpoint_step{{{TRAIN}}}": "0+10x120",
    f"slipway_train_loss{{{TRAIN}}}": "3x120",
    f'kube_job_status_failed{{namespace="{NAMESPACE}", job_name="train-pylib-1"}}': "0x120",
}
"""Series of a stack that is well, a sample a minute for two hours."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What becomes of the series at minute 60, and the labels of the alert."""

    series: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict[str, str])
    seen_after_min: int = 1
    """Minutes until the condition holds, before the alert's own wait."""


def slow(metric: str, fast: str, slow_one: str) -> dict[str, str]:
    """Of a histogram whose observations all get slow."""
    name = f"slipway_serve_{metric}_seconds_bucket"
    return {
        f'{name}{{{SERVICE}, le="{fast}"}}': "0+60x59 3540x60",
        f'{name}{{{SERVICE}, le="{slow_one}"}}': "0+60x120",
        f'{name}{{{SERVICE}, le="+Inf"}}': "0+60x120",
    }


# Every alert, by the fault that it is for. An alert that is new has none here, and the test says so.
FAULTS: dict[str, Fault] = {
    "SlipwayTimeToFirstTokenHigh": Fault(series=slow("ttft", "0.5", "10")),
    "SlipwayTimePerTokenHigh": Fault(series=slow("tpot", "0.05", "1")),
    "SlipwayErrorBudgetBurning": Fault(
        series={
            f'slipway_serve_requests_total{{{SERVICE}, outcome="stop"}}': "0+60x59 3540x60",
            f'slipway_serve_requests_total{{{SERVICE}, outcome="error"}}': "0x59 0+60x60",
        },
        seen_after_min=2,
    ),
    "SlipwayNoReplicaReady": Fault(series={f"slipway_serve_ready{{{SERVICE}}}": "1x59 0x60"}),
    "SlipwayAtMaxReplicas": Fault(series={f"slipway_serve_requests_in_flight{{{SERVICE}}}": "2x59 40x60"}),
    "SlipwayTrainingStalled": Fault(
        series={
            f"slipway_train_step{{{TRAIN}}}": "0+10x59 590x60",
            f"slipway_train_last_checkpoint_step{{{TRAIN}}}": "0+10x59 590x60",
        },
        labels={"namespace": NAMESPACE, "pod": "train-0"},
        seen_after_min=30,
    ),
    "SlipwayCheckpointOverdue": Fault(
        series={f"slipway_train_last_checkpoint_step{{{TRAIN}}}": "0+10x59 590x60"}, seen_after_min=11
    ),
    "SlipwayLossNotFinite": Fault(
        series={f"slipway_train_loss{{{TRAIN}}}": "3x59" + 60 * " NaN"},
        labels={"namespace": NAMESPACE, "pod": "train-0"},
    ),
    "SlipwayJobFailed": Fault(
        series={f'kube_job_status_failed{{namespace="{NAMESPACE}", job_name="train-pylib-1"}}': "0x59 1x60"},
        labels={"namespace": NAMESPACE, "job_name": "train-pylib-1"},
    ),
}


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules that the repository's `dev` renders, as Prometheus reads them."""
    folder = tmp_path_factory.mktemp("rules")
    slipway("render", "-s", "dev", "-o", str(folder / "dev"))
    (manifest,) = (folder / "dev").glob("*-prometheusrule-*.yaml")
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": yaml.safe_load(manifest.read_text())["spec"]["groups"]}))
    return path


@pytest.fixture(scope="module")
def promtool() -> Path:
    try:
        unpacked = debian.programs(Places.of_user().cache, {}, files=["prometheus"], say=print)
    except Unable as error:
        pytest.skip(f"no promtool here: {error}")
    return unpacked.file("bin/promtool")


def alerts(rules: Path) -> dict[str, Json]:
    groups = yaml.safe_load(rules.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def verdict(promtool: Path, rules: Path, *, series: dict[str, str], expected: dict[tuple[str, int], list[Json]]) -> str:
    """What promtool says against it: empty when each (alert, minute) is as expected."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"alertname": name, "eval_time": f"{minute}m", "exp_alerts": wanted}
            for (name, minute), wanted in expected.items()
        ],
    }
    path = rules.with_name("test.json")  # JSON is YAML
    path.write_text(json.dumps({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_every_alert_has_its_fault(rules: Path) -> None:
    assert set(alerts(rules)) == set(FAULTS)


def test_none_fires_while_all_is_well(rules: Path, promtool: Path) -> None:
    expected = {(name, minute): list[Json]() for name in FAULTS for minute in (30, 60, 119)}
    assert verdict(promtool, rules, series=HEALTHY, expected=expected) == ""


@pytest.mark.parametrize("name", FAULTS)
def test_it_fires_by_its_fault_after_its_time(name: str, rules: Path, promtool: Path) -> None:
    fault, rule = FAULTS[name], alerts(rules)[name]
    holds_at = 60 + fault.seen_after_min
    waits_min = int(rule["for"].removesuffix("m"))
    summary = rule["annotations"]["summary"].replace("{{ $labels.job_name }}", fault.labels.get("job_name", ""))
    fired = {"exp_labels": rule["labels"] | fault.labels, "exp_annotations": {"summary": summary}}
    expected: dict[tuple[str, int], list[Json]] = {(name, 59): [], (name, holds_at + waits_min + 1): [fired]}
    if waits_min > 1:
        expected[name, holds_at + waits_min - 2] = []
    assert verdict(promtool, rules, series=HEALTHY | fault.series, expected=expected) == ""
