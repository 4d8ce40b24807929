"""Render: the same bytes for the same stack, nothing left over, nothing half-done, no secret in clear."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from infra.checks import Refused
from infra.render import render, run
from infra.render.program import RenderError, _refuse_secrets
from infra.spec import StackError

ROOT = Path(__file__).parents[3]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_stack_gives_the_same_bytes_in_any_process_and_place(stack_path: Path, tmp_path: Path) -> None:
    render(stack_path, tmp_path / "one")
    program = "import sys; from pathlib import Path; from infra.render import render; render(*map(Path, sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", program, str(stack_path), str(tmp_path / "two")]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=120)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_files_name_no_place_of_this_machine(stack_path: Path, tmp_path: Path) -> None:
    render(stack_path, tmp_path)
    for name, text in contents(tmp_path).items():
        assert str(ROOT).encode() not in text, name


def test_one_object_a_file_and_a_plan(stack_path: Path, tmp_path: Path) -> None:
    rendered = render(stack_path, tmp_path)
    objects = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("*.yaml")]
    assert len(objects) == len(rendered.manifests)
    assert all({"apiVersion", "kind", "metadata"} <= one.keys() for one in objects)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan.keys() == {"plan", "findings", "outputs", "images"}
    assert plan["plan"]["services"][0]["name"] == "chat"
    assert plan["outputs"].keys() == {"endpoint", "jobs", "channels"}


def test_the_namespace_comes_first(tmp_path: Path) -> None:
    render(ROOT / "stacks" / "Pulumi.local.yaml", tmp_path)
    assert min(path.name for path in tmp_path.glob("*.yaml")) == "00-namespace-slipway.yaml"


def test_what_an_earlier_render_left_goes_and_what_others_wrote_stays(
    changed: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.yaml").write_text("kind: Mine\n")
    render(changed("local", {}), out)
    before = contents(out).keys()
    render(changed("local", {"training": None}), out)
    after = contents(out).keys()
    assert not any("-job-" in name for name in after)
    assert any("-job-" in name for name in before)
    assert (out / "mine.yaml").read_text() == "kind: Mine\n"


def test_an_unchanged_file_is_not_touched(tmp_path: Path) -> None:
    stack = ROOT / "stacks" / "Pulumi.local.yaml"
    render(stack, tmp_path)
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    render(stack, tmp_path)
    assert {path.stat().st_mtime for path in tmp_path.glob("*.yaml")} == {1}


def test_a_bad_stack_file_is_named_with_its_line_and_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "Pulumi.mine.yaml"
    text = (ROOT / "stacks" / "Pulumi.local.yaml").read_text()
    file.write_text(text.replace("global_batch", "global_bach"))
    with pytest.raises(StackError, match=r"Pulumi\.mine\.yaml:\d+: .*did you mean `global_batch`"):
        render(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refused_stack_is_not_written(changed: Callable[..., Path], tmp_path: Path) -> None:
    path = changed("prod", {"training.nodes": 50})
    with pytest.raises(Refused) as refused:
        render(path, tmp_path / "out")
    assert refused.value.findings
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "nodes: 50" in text)
    assert str(refused.value).startswith(f"{path}:{line}: SLW101 error: training.nodes: ")
    assert not (tmp_path / "out").exists()
    # The process is none the worse for it.
    assert run(ROOT / "stacks" / "Pulumi.local.yaml").manifests


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"services.0.name": "router"}, "choose another"),
        ({"node_pools.0.capacity": ["on-demand", "spot"]}, "Karpenter takes spot first"),
        (
            {"training.parallelism": {"tp": 3}},
            r"Pulumi.prod.yaml:\d+: slipway:training.parallelism: .* does not divide",
        ),
    ],
)
def test_what_cannot_be_declared_is_one_sentence(
    changed: Callable[..., Path], values: dict[str, object], match: str
) -> None:
    with pytest.raises(ValueError, match=match) as error:
        run(changed("prod", values))
    assert "\n" not in str(error.value)


def test_a_secret_is_refused_at_any_depth() -> None:
    from pulumi.runtime import rpc

    secret = {rpc._special_sig_key: rpc._special_secret_sig, "value": "hunter2"}
    with pytest.raises(RenderError, match="a secret value in Deployment x") as error:
        _refuse_secrets({"spec": [{"env": secret}]}, where="Deployment x")
    assert "hunter2" not in str(error.value)
    _refuse_secrets({"spec": [{"env": "open"}]}, where="Deployment x")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RenderError, match="give another directory"):
        render(ROOT / "stacks" / "Pulumi.local.yaml", tmp_path / "file" / "out")
