"""Search and `auto`: the cheapest that does the job, the same each time, explained, and passed by the checks."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from infra.catalog import instance, models
from infra.checks import check
from infra.cli.main import app
from infra.planner import plan, to_json
from infra.planner.estimate import MARGIN
from infra.planner.layouts import best_layout
from infra.planner.run import check_layout
from infra.planner.search import Found, cheapest_serving, cheapest_training, of_cloud
from infra.planner.serve_memory import FORMATS
from infra.planner.shape import Shape
from infra.spec import Slo, Stack, StackError, Traffic, load, parse

ROOT = Path(__file__).parents[3]
SMALL, LARGE = (Shape.from_config(models()[name]) for name in ("llama3.2-1b", "llama3-70b"))


def train(tokens: float = 1e10, deadline_h: float = 48, shape: Shape = SMALL) -> Found:
    among = of_cloud("aws")
    return cheapest_training(shape, tokens=tokens, deadline_h=deadline_h, seq=4096, global_batch=256, among=among)


def serve(rps: float = 10, ttft_p95_s: float = 0.5, shape: Shape = SMALL) -> Found:
    slo = Slo(ttft_p95_s=ttft_p95_s)
    return cheapest_serving(shape, traffic=Traffic(rps=rps), slo=slo, among=of_cloud(None), form=FORMATS["bf16"])


@pytest.mark.parametrize("search", [train, serve])
def test_choices_are_four_the_cheapest_first_and_the_same_each_time(search) -> None:
    found = search()
    prices = [choice.numbers["usd"] for choice in found.choices]
    assert len(prices) == 4
    assert prices == sorted(prices)
    assert len({choice.instance for choice in found.choices}) == 4
    assert search() == found
    assert found.why


@settings(max_examples=6, deadline=None)
@given(deadline_h=st.floats(1, 500))
def test_a_choice_to_train_meets_the_deadline_and_the_memory(deadline_h: float) -> None:
    for choice in train(deadline_h=deadline_h, shape=LARGE, tokens=2e9).choices:
        assert choice.numbers["hours"] <= deadline_h
        assert choice.memory_gib <= MARGIN * choice.memory_limit_gib


@settings(max_examples=3, deadline=None)
@given(tokens=st.floats(1e9, 1e11), times=st.floats(1, 5))
def test_price_never_falls_with_more_tokens(tokens: float, times: float) -> None:
    few, many = (train(tokens=n, deadline_h=200).choices[0].numbers["usd"] for n in (tokens, tokens * times))
    assert few <= many * (1 + 1e-9)


@settings(max_examples=3, deadline=None)
@given(deadline_h=st.floats(10, 100), times=st.floats(1, 10))
def test_more_time_is_never_dearer(deadline_h: float, times: float) -> None:
    soon, late = (train(deadline_h=h).choices[0].numbers["usd"] for h in (deadline_h, deadline_h * times))
    assert late <= soon * (1 + 1e-9)


def test_no_candidate_that_was_left_out_is_cheaper() -> None:
    found = train()
    for machine in of_cloud("aws"):
        for nodes in (1, 2, 4):
            fit = best_layout(SMALL, seq=4096, global_batch=256, instance=machine, nodes=nodes)
            if fit and 1e10 / fit.tokens_per_s / 3600 <= 48:
                usd = 1e10 / fit.tokens_per_s / 3600 * nodes * (machine.price or 0)
                assert usd >= found.choices[0].numbers["usd"] * (1 - 1e-9), machine.name


def test_what_no_hardware_does_is_said() -> None:
    assert "the fastest takes" in train(deadline_h=0.6, tokens=3e11).why
    assert not serve(ttft_p95_s=0.0001).choices
    huge = Shape(layers=400, hidden=65536, heads=512, kv_heads=512, head_dim=128, ffn=262144, vocab=256000)
    assert "fit" in serve(shape=huge).why


@settings(max_examples=8, deadline=None)
@given(nodes=st.sampled_from([1, 2, 4, 16]), name=st.sampled_from(["p5.48xlarge", "g5.48xlarge", "p4d.24xlarge"]))
def test_a_layout_fits_and_is_allowed(nodes: int, name: str) -> None:
    machine = instance(name)
    fit = best_layout(LARGE, seq=4096, global_batch=256, instance=machine, nodes=nodes)
    if fit:
        check_layout(LARGE, fit.run.layout)
        assert fit.run.layout.gpus == nodes * machine.gpus
        assert fit.run.tokens_per_step == 256 * 4096
        assert fit.memory.value <= MARGIN * 80


def stack(*, training: dict[str, Any] | None = None, service: dict[str, Any] | None = None, **pools: str) -> Stack:
    values = load(ROOT / "stacks" / "Pulumi.prod.yaml").model_dump(mode="json")
    values["training"] |= training or {}
    values["services"][0] |= service or {}
    if service and "kv_share" in service:
        del values["services"][0]["kv_gib"]
    for pool in values["node_pools"]:
        pool["instance"] = pools.get(pool["name"], pool["instance"])
    return Stack.model_validate(values)


LEFT_OPEN = {"parallelism": "auto", "deadline_h": 24.0}
SERVED = {"autoscaling": None, "replicas": "auto", "traffic": {"rps": 30.0}}


@pytest.mark.parametrize(
    "given_stack",
    [
        stack(training=LEFT_OPEN),
        stack(training=LEFT_OPEN, train="auto"),
        stack(service=SERVED, serve="auto"),
        stack(training=LEFT_OPEN, service=SERVED, train="auto", serve="auto"),
        stack(service=SERVED | {"kv_share": 0.9}, serve="auto"),
    ],
)
def test_auto_passes_the_checks_and_says_why(given_stack: Stack) -> None:
    planned = plan(given_stack)
    assert [finding for finding in check(given_stack, planned) if finding.severity == "error"] == []
    assert "auto" not in {pool.instance for pool in planned.stack.node_pools}
    assert all(chosen.why for chosen in planned.chosen)
    assert plan(given_stack) == planned
    json.dumps(to_json(planned), allow_nan=False)


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0.01, 0.999), gpus=st.sampled_from([0, 1]))
def test_a_share_for_the_cache_is_what_the_checks_let_it_have_and_no_more(share: float, gpus: int) -> None:
    """On a GPU of its memory, without one of the container's; whoever asks for more is refused."""
    given_stack = stack(service={"kv_share": share, "gpus": gpus, "max_model_len": 16})
    planned = plan(given_stack)
    assert [finding for finding in check(given_stack, planned) if finding.severity == "error"] == []
    (service,), (found,) = planned.stack.services, planned.services
    assert found.memory is not None
    free_gib = MARGIN * found.memory_limit_gib - found.memory.value + service.kv_gib
    assert service.kv_gib == pytest.approx(share * free_gib, abs=0.001)
    assert f"{share:.0%}" in planned.chosen[0].why


def test_a_stack_that_leaves_nothing_open_stays_as_it_is(stack_path: Path) -> None:
    spec = load(stack_path)
    assert plan(spec).stack is spec
    assert plan(spec).chosen == ()


@pytest.mark.parametrize(
    ("given_stack", "says"),
    [
        (stack(train="auto"), "set training.deadline_h"),
        (stack(training={"deadline_h": 0.001}, train="auto"), "raise training.deadline_h"),
        (
            stack(service={"autoscaling": None, "replicas": "auto", "traffic": None}),
            "auto needs `traffic` on the service",
        ),
        (stack(service={"replicas": "auto"}), "leave replicas out"),
        (stack(service=SERVED | {"slo": {"ttft_p95_s": 0.0001}}), "raise slo"),
        (stack(service={"model": "nobodys", "kv_share": 0.5}), "kv_share: a share needs a model of this stack"),
        (stack(service={"gpus": 0}, serve="auto"), "asks for no GPU"),
        (stack(training={"parallelism": {"fsdp": 3}}), "does not divide 16 ranks; the nearest that does is 2"),
        (
            stack(training={"parallelism": {"tp": 2, "pp": 32}, "nodes": 8}),
            "training.parallelism: pp 32 is above 16 layers",
        ),
    ],
)
def test_what_auto_cannot_do_is_refused_with_the_fix(given_stack: Stack, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plan(given_stack)


def test_a_bad_value_in_place_of_auto_gets_one_error() -> None:
    values = load(ROOT / "stacks" / "Pulumi.prod.yaml").model_dump(mode="json")
    values["services"][0]["replicas"] = 0
    values["training"]["parallelism"] = "autp"
    with pytest.raises(StackError) as refused:
        parse(values, path=ROOT / "stacks" / "Pulumi.prod.yaml")
    assert len(str(refused.value).splitlines()) == 2


def run_size(*arguments: str):
    return CliRunner().invoke(app, ["size", *arguments])


def test_size_prints_one_document(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(models()["llama3.2-1b"]))
    by_name, by_file = (
        run_size(model, "--rps", "5", "--ttft", "0.5", "--json") for model in ("llama3.2-1b", str(config))
    )
    assert by_name.exit_code == 0
    document = json.loads(by_name.stdout)
    assert document["parameters"] == 1_235_814_400
    assert len(document["choices"]) == 4
    assert json.loads(by_file.stdout)["choices"] == document["choices"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("lama3-8b", "--rps", "1", "--ttft", "1"), "did you mean 'llama3-8b'"),
        (("llama3-8b",), "nothing to size for"),
        (("llama3-8b", "--tokens", "1e9", "--rps", "1"), "nothing to size for"),
        (("llama3-8b", "--tokens", "1e9"), "--deadline is missing"),
        (("llama3-8b", "--tokens", "-1", "--deadline", "1"), "--tokens -1 is not between"),
        (("llama3-8b", "--tokens", "nan", "--deadline", "1"), "--tokens nan is not between"),
        (("llama3-8b", "--tokens", "inf", "--deadline", "1"), "--tokens inf is not between"),
        (("llama3-8b", "--rps", "1", "--ttft", "1", "--weights", "fp7"), "known are fp32"),
        (("llama3-8b", "--rps", "1", "--ttft", "1", "--cloud", "moon"), "no instance of that cloud"),
        (("nowhere/config.json", "--rps", "1", "--ttft", "1"), "no such file"),
    ],
)
def test_size_refuses_bad_input(arguments, says) -> None:
    refused = run_size(*arguments)
    assert refused.exit_code != 0
    assert says in str(refused.exception)
