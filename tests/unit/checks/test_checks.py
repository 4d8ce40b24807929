"""Each rule refuses what it is for, with the numbers and a fix that, applied, ends the finding."""

from pathlib import Path

import pytest

from infra.checks import CHECKS, Refused, check, enforce
from infra.planner import plan
from infra.spec import load

# code, stack, what breaks it, words that the message must have, the change that the fix names
CASES = [
    ("SLW101", "prod", {"training.nodes": 3}, "a gang of 3 nodes, and pool 'train' can hold 2", {"training.nodes": 2}),
    (
        "SLW102",
        "prod",
        {"training.nproc_per_node": 16},
        "16 ranks a node, and p5.48xlarge has 8 GPUs",
        {"training.nproc_per_node": 8},
    ),
    (
        "SLW103",
        "prod",
        {"services.0.autoscaling.max_replicas": 20},
        "20 replicas and one of surge need 21 nodes",
        {"services.0.autoscaling.max_replicas": 8},
    ),
    ("SLW104", "prod", {"services.0.gpus": 2}, "one replica asks for 2 GPUs", {"services.0.gpus": 1}),
    ("SLW201", "prod", {"training.micro_batch": 16}, "a rank needs about", {"training.micro_batch": 4}),
    ("SLW202", "prod", {"services.0.kv_gib": 60}, "a replica needs about", {"services.0.kv_gib": 24}),
    (
        "SLW203",
        "prod",
        {"services.0.kv_gib": 0.01},
        "the KV cache holds 163 tokens, and one request may have 4096",
        {"services.0.kv_gib": 1},
    ),
    (
        "SLW204",
        "prod",
        {"services.0.max_model_len": 8192},
        "max_model_len 8192 is above the model's 4096",
        {"services.0.max_model_len": 4096},
    ),
    (
        "SLW301",
        "prod",
        {"training.global_batch": 250},
        "no multiple of micro_batch 4 × 16 ranks = 64",
        {"training.global_batch": 256},
    ),
    ("SLW302", "prod", {"storage.shared": False}, "ReadWriteOnce", {"storage.shared": True}),
    (
        "SLW303",
        "prod",
        {"node_pools.0.instance": "a3-highgpu-8g"},
        "is an instance type of gcp",
        {"node_pools.0.instance": "p5.48xlarge"},
    ),
    (
        "SLW701",
        "prod",
        {"budget.usd_per_h": 100},
        "cost 126.83 USD/h, and the budget is 100.00",
        {"budget.usd_per_h": 140},
    ),
    ("SLW702", "prod", {"budget.usd_per_run": 10}, "USD on demand, and the budget is 10", {"budget.usd_per_run": 4000}),
    (
        "SLW703",
        "prod",
        {"node_pools.0.instance": "p5e.48xlarge"},
        "no price of p5e.48xlarge",
        {"node_pools.0.instance": "p5en.48xlarge", "budget.usd_per_h": 200},
    ),
]


@pytest.mark.parametrize(("code", "stack", "broken", "says", "fixed"), CASES, ids=[case[0] for case in CASES])
def test_rule_refuses_and_its_fix_holds(variant, code, stack, broken, says, fixed) -> None:
    spec = variant(stack, broken)
    found = [finding for finding in check(spec, plan(spec)) if finding.code == code]
    assert len(found) == 1
    assert says in found[0].message
    assert found[0].fix
    mended = variant(stack, broken | fixed)
    assert code not in {finding.code for finding in check(mended, plan(mended))}


def test_every_code_of_the_rules_has_a_case() -> None:
    import re

    codes = {code for rule in CHECKS for code in re.findall(r"SLW\d{3}", rule.__doc__ or "")} | {"SLW104"}
    assert codes == {case[0] for case in CASES}


def test_stacks_of_the_repository_are_clean(stack_path: Path) -> None:
    spec = load(stack_path)
    assert check(spec, plan(spec)) == ()


def test_severity_can_be_set(variant) -> None:
    broken = {"training.nodes": 4, "budget": {}}
    spec = variant("prod", broken)
    with pytest.raises(Refused, match="SLW101"):
        enforce(spec, plan(spec))
    spec = variant("prod", broken | {"checks": {"SLW101": "warn"}})
    assert [finding.severity for finding in enforce(spec, plan(spec))] == ["warn"]
    spec = variant("prod", broken | {"checks": {"SLW101": "off"}})
    assert enforce(spec, plan(spec)) == ()
