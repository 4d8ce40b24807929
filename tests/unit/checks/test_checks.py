"""Each rule finds what it is for, with the numbers, and a fix that, applied, ends the finding."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.checks import CHECKS, MANIFEST_CHECKS, SET_CHECKS, Finding, Refused, check, codes_of, enforce
from infra.cli.edit import apply
from infra.planner import plan
from infra.spec import Stack, load

Values = dict[str, Any]
ROOT = Path(__file__).parents[3]
CASES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "cases.yaml").read_text())
# What only people can decide, or what the file does not say.
WITHOUT_PATCH = {
    "SLW001",
    "SLW302",
    "SLW307",
    "SLW308",
    "SLW309",
    "SLW404",
    "SLW405",
    "SLW602",
    "SLW603",
    "SLW701",
    "SLW702",
    "SLW703",
    "SLW704",
    "SLW706",
}
each_case = pytest.mark.parametrize("case", CASES, ids=[f"{case['code']}-{case['severity']}" for case in CASES])


def found(stack: Stack, code: str) -> list[Finding]:
    return [finding for finding in check(stack, plan(stack)) if finding.code == code]


@each_case
def test_rule_finds_and_its_fix_holds(variant: Callable[..., Stack], case: dict[str, Any]) -> None:
    (finding,) = found(variant(case["stack"], case["broken"]), case["code"])
    assert case["says"] in finding.message
    assert finding.severity == case["severity"]
    assert finding.fix
    assert found(variant(case["stack"], case["broken"] | case["mended"]), case["code"]) == []


@each_case
def test_a_patch_applied_to_the_file_ends_its_finding(changed: Callable[..., Path], case: dict[str, Any]) -> None:
    file = changed(case["stack"], case["broken"])
    (finding,) = found(load(file), case["code"])
    if finding.patch is None:
        assert case["code"] in WITHOUT_PATCH
        return
    file.write_text(apply(file.read_text(), finding.patch))
    assert found(load(file), case["code"]) == []


def test_every_code_has_a_meaning_a_case_and_a_line_in_the_docs() -> None:
    of_stacks = {code for rule in CHECKS for code in codes_of(rule)}
    assert of_stacks == {case["code"] for case in CASES}
    docs = (ROOT / "docs" / "checks.md").read_text()
    rules = (*CHECKS, *MANIFEST_CHECKS, *SET_CHECKS)
    rows = [(code, meaning) for rule in rules for code, meaning in codes_of(rule).items()]
    assert [
        code for code, meaning in rows if not re.search(rf"\| {code} \| [a-z ]+ \| {re.escape(meaning)} \|", docs)
    ] == []


def test_stacks_of_the_repository_are_clean(stack_path: Path) -> None:
    spec = load(stack_path)
    assert check(spec, plan(spec)) == ()


def test_severity_can_be_set(variant: Callable[..., Stack]) -> None:
    broken: Values = {"training.nodes": 4, "budget": {}}
    spec = variant("prod", broken)
    with pytest.raises(Refused, match="SLW101"):
        enforce(spec, plan(spec))
    spec = variant("prod", broken | {"checks": {"SLW101": "warn"}})
    assert [finding.severity for finding in enforce(spec, plan(spec))] == ["warn"]
    spec = variant("prod", broken | {"checks": {"SLW101": "off"}})
    assert enforce(spec, plan(spec)) == ()


def test_unused_nodes_go_before_the_budget_is_given_up(changed: Callable[..., Path]) -> None:
    file = changed("prod", {"node_pools.1.max_nodes": 100})
    (finding,) = found(load(file), "SLW701")
    assert finding.patch == {"node_pools.serve.max_nodes": 9}
    file.write_text(apply(file.read_text(), finding.patch))
    assert check(load(file), plan(load(file))) == ()


AUTO = [
    {"node_pools.1.instance": "auto", "services.0.traffic": {"rps": 20}},
    {"node_pools.0.instance": "auto", "training.deadline_h": 30},
    {"training.parallelism": "auto", "training.micro_batch": 1},
    {"services.0.replicas": "auto", "services.0.autoscaling": None, "services.0.traffic": {"rps": 40}},
]


@pytest.mark.parametrize("values", AUTO)
def test_what_auto_chooses_passes_the_checks(variant: Callable[..., Stack], values: Values) -> None:
    stack = variant("prod", values | {"budget": {}})
    assert [finding for finding in check(stack, plan(stack)) if finding.severity == "error"] == []


def test_a_layout_that_splits_layers_shares_the_batch_among_fewer(variant: Callable[..., Stack]) -> None:
    """16 ranks of tp 8 are two that see different sequences: a batch of 250 is 2 × 125."""
    values = {"training.parallelism": {"tp": 8}, "training.global_batch": 250, "training.micro_batch": 5}
    assert found(variant("prod", values), "SLW301") == []


numbers = st.integers(min_value=1, max_value=64)


@settings(max_examples=60, deadline=None)
@given(gang=numbers, least=numbers, more=st.integers(0, 40), nodes=numbers, gpus=st.sampled_from([1, 2, 4, 8]))
def test_what_a_packing_holds_is_never_refused_for_room(
    gang: int, least: int, more: int, nodes: int, gpus: int
) -> None:
    """Pods are placed one by one on nodes of 8 GPUs; where all find room, no capacity rule may be an error."""
    values = {
        "training.nodes": gang,
        "node_pools.0.max_nodes": nodes,
        "services.0": {
            "name": "chat", "model": "code-1b", "pool": "train", "gpus": gpus, "kv_gib": 4,
            "resources": {"cpus": 2, "memory_gib": 16},
            "autoscaling": {"min_replicas": least, "max_replicas": least + more},
        },
    }  # fmt: skip
    stack = _prod(values)
    codes = {f.code for f in check(stack, plan(stack)) if f.severity == "error"} & {
        "SLW101",
        "SLW103",
        "SLW104",
        "SLW105",
    }
    on_one_node = 8 // gpus
    everything_fits = gang + -(-(least + more) // on_one_node) <= nodes
    if everything_fits:
        assert codes == set()
    if gang > nodes or gang * 8 + least * gpus > nodes * 8:
        assert codes


def _prod(values: Values) -> Stack:
    """prod with values set, without a file."""
    document = load(ROOT / "stacks" / "Pulumi.prod.yaml").model_dump(mode="json")
    for path, value in values.items():
        node: Any = document
        *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in keys:
            node = node[key]
        node[last] = value
    return Stack.model_validate(document)
