"""A stack file is read whole or refused with the line, the key and the fix."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from infra.cli.reference import reference
from infra.planner import plan
from infra.spec import StackError, load, located, parse, schema

ROOT = Path(__file__).parents[3]


def refusal(path: Path) -> str:
    with pytest.raises(StackError) as caught:
        load(path)
    return str(caught.value)


def line_of(path: Path, text: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_every_stack_of_the_repository_loads(stack_path: Path) -> None:
    assert load(stack_path).services


@pytest.mark.parametrize(
    ("key", "value", "typo", "meant"),
    [
        ("training.global_batch", 256, "training.globalbatch", "global_batch"),
        ("node_pools.0.max_nodes", 2, "node_pools.0.max_node", "max_nodes"),
        ("services.0.autoscaling.max_replicas", 3, "services.0.autoscaling.maxreplicas", "max_replicas"),
        ("training.data.source.path", "x", "training.data.source.pth", "path"),
        ("monitoring.objectives.ttft_p95_s", 1, "monitoring.objectives.ttft_p95", "ttft_p95_s"),
    ],
)
def test_unknown_key_is_refused_with_line_and_nearest(changed, key, value, typo, meant) -> None:
    path = changed("prod", {typo: value})
    message = refusal(path)
    line = line_of(path, typo.rsplit(".", 1)[1] + ":")
    assert f"{path}:{line}: slipway:{typo}: unknown key; did you mean `{meant}`?" in message


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"training.steps": "many"}, 'steps: must be a whole number, and it is "many"'),
        ({"training.steps": 0}, "must be at least 1, and it is 0"),
        ({"training.steps": -3}, "must be at least 1, and it is -3"),
        ({"training.steps": 10**18}, "must be at most 1099511627776"),
        ({"training.nodes": True}, "true and false are no value of this key, and it is true"),
        ({"services.0.surge": 1}, "services.0.surge: must be true or false, and it is 1"),
        ({"training.parallelism": "aut"}, 'training.parallelism: must be `auto` or a value, and it is "aut"'),
        ({"training.parallelism": {"vpp": 3}}, "parallelism.vpp: 3 chunks of a pipeline stage, and no pipeline"),
        ({"training.data.source.kind": "txt"}, '`kind` "txt" does not exist; did you mean `text`?'),
        ({"platform.cloud": "awz"}, '"awz" is no choice; did you mean `aws`?'),
        ({"node_pools.0.capacity": "spot"}, 'must be a list, as [a, b], and it is "spot"'),
        ({"training.optim": "fast"}, 'training.optim: must be keys with values, and it is "fast"'),
        ({"training.model.heads": 2**40}, "model.heads: must be at most 65536"),
        ({"services.0.resources.cpus": 1e-15}, "resources.cpus: must be at least 0.01"),
        ({"registry.url": "acme"}, "registry.url: 'acme' is no URL of an object store"),
        ({"training.optim.lr": float("nan")}, "finite"),
        ({"training.optim.lr": float("inf")}, "finite"),
        ({"training.seq": 8192}, "seq 8192 is above model.max_context 4096"),
        ({"training.model.kv_heads": 3}, "kv_heads 3 does not divide heads 16; the nearest that does is"),
        ({"training.model.heads": 12, "training.model.kv_heads": 4}, "hidden 2048 is not a multiple of heads 12"),
        ({"training.pool": "trian"}, "did you mean 'train'"),
        ({"services.0.pool": "nowhere"}, "node pool 'nowhere' does not exist"),
        ({"node_pools.1.name": "train"}, "node_pools.1.name: 'train' is the name of node_pools.0 already"),
        ({"node_pools.0.min_nodes": 5}, "min_nodes: 5 is above max_nodes 2"),
        ({"services.0.autoscaling.min_replicas": 99}, "min_replicas: 99 is above max_replicas 8"),
        ({"platform.region": None}, "cloud: cloud 'aws' needs `region` and `cluster`"),
        ({"services.0.name": "router"}, "a service cannot be called 'router'"),
        ({"router.hash_header": "x-user", "router.policy": "random"}, "needs policy ring_hash or maglev"),
        ({"training.name": "Not A Name"}, "lower-case letters, digits and dashes"),
        ({"training.name": "n" * 10_000}, "and it is 'nnnn"),
    ],
)
def test_bad_value_is_refused_with_its_numbers(changed, values, says) -> None:
    assert says in refusal(changed("prod", values))


@pytest.mark.parametrize(
    ("key", "value"),
    [("services.0.pool", "nowhere"), ("services.0.name", "router"), ("training.seq", 8192), ("training.pool", "trian")],
)
def test_a_contradiction_is_told_at_the_line_of_its_value(changed, key, value) -> None:
    path = changed("prod", {key: value})
    line = line_of(path, f"{key.rsplit('.', 1)[1]}: {value}")
    assert f"{path}:{line}: slipway:{key}: " in refusal(path)


def test_all_errors_are_told_at_once(changed) -> None:
    message = refusal(changed("prod", {"training.steps": 0, "training.stepz": 1, "router.port": 99999}))
    assert len(message.splitlines()) == 3


def test_a_long_value_is_cut(changed) -> None:
    assert all(len(line) < 400 for line in refusal(changed("prod", {"training.name": ["x"] * 1_000})).splitlines())


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"", b"[1, 2]", b"config: 3", b"a: [", b"config:\n  slipway:platform:\n"]
)
def test_rubbish_is_refused_and_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "Pulumi.x.yaml"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_missing_file_names_those_that_are_there() -> None:
    assert "dev, local, prod, staging" in refusal(ROOT / "stacks" / "Pulumi.nope.yaml")


def test_values_of_other_namespaces_are_left_alone(tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "stacks" / "Pulumi.local.yaml").read_text())
    document["config"]["aws:region"] = "us-east-1"
    path = tmp_path / "Pulumi.local.yaml"
    path.write_text(yaml.safe_dump(document))
    assert load(path) == load(ROOT / "stacks" / "Pulumi.local.yaml")


@pytest.mark.parametrize("key", ["router", "Slipway:router", "slipwy:router"])
def test_a_key_outside_the_namespace_is_not_passed_over(tmp_path: Path, key: str) -> None:
    path = tmp_path / "Pulumi.local.yaml"
    path.write_text((ROOT / "stacks" / "Pulumi.local.yaml").read_text().replace("slipway:router", key))
    assert f":{line_of(path, key)}: {key}: unknown key; did you mean `slipway:router`?" in refusal(path)


@pytest.mark.parametrize(
    ("values", "where", "says"),
    [
        ({"node_pools.1.instance": "g6e.xlrge"}, "node_pools.serve.instance", "did you mean 'g6e.xlarge'"),
        ({"node_pools.0.instance": "auto"}, "node_pools.train.instance", "set training.deadline_h"),
        ({"training.parallelism": {"tp": 3}}, "training.parallelism", "3 does not divide 16 ranks"),
    ],
)
def test_what_the_planner_finds_impossible_is_told_with_its_line(changed, values, where, says) -> None:
    path = changed("prod", values)
    ((key, value),) = values.items()
    line = line_of(path, f"{key.rpartition('.')[2]}:" + (f" {value}" if isinstance(value, str) else ""))
    with pytest.raises(StackError) as caught, located(path):
        plan(load(path))
    assert f"{path}:{line}: slipway:{where}: " in str(caught.value)
    assert says in str(caught.value)


def test_schema_accepts_exactly_what_loads(stack_path: Path) -> None:
    document = yaml.safe_load(stack_path.read_text())
    validator = Draft202012Validator(schema())
    assert validator.is_valid(document)
    document["config"]["slipway:trainning"] = {}
    assert not validator.is_valid(document)


def test_kept_schema_and_reference_are_those_of_the_code() -> None:
    assert json.loads((ROOT / "infra/spec/stack.schema.json").read_text()) == schema()
    assert (ROOT / "docs/stack-reference.md").read_text() == reference(schema())


def test_every_key_is_explained() -> None:
    for name, part in schema()["$defs"].items():
        for key, value in part.get("properties", {}).items():
            assert value.get("description"), f"{name}.{key} has no docstring"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(
    values=st.dictionaries(
        st.sampled_from(["platform", "node_pools", "training", "services", "x"]), json_values, max_size=5
    )
)
def test_any_rubbish_ends_in_a_stack_error(values) -> None:
    with pytest.raises(StackError):
        parse(values, path=Path("Pulumi.fuzz.yaml"))
