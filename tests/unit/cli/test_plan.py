"""`slipway plan`: patches that keep the file's layout, differences from another plan, and the page for a pull request."""

import json
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from infra.checks import check
from infra.cli.against import changes
from infra.cli.edit import EditError, apply
from infra.cli.fix import fix
from infra.cli.main import app, main
from infra.cli.report import page
from infra.planner import plan
from infra.render import render
from infra.spec import load

ROOT = Path(__file__).parents[3]
TEXTS = {path.name: path.read_text() for path in sorted((ROOT / "stacks").glob("Pulumi.*.yaml"))}


def paths(node: Any, at: tuple[str, ...] = ()) -> list[str]:
    """Every dotted path to a value, items of a list by their name."""
    if isinstance(node, dict):
        return [path for key, inner in node.items() for path in paths(inner, (*at, key.removeprefix("slipway:")))]
    if isinstance(node, list) and node and isinstance(node[0], dict):
        return [path for item in node for path in paths(item, (*at, item["name"])) if not path.endswith(".name")]
    return [".".join(at)]


EDITABLE = [(name, path) for name, text in TEXTS.items() for path in paths(yaml.safe_load(text)["config"])]
NEW = [
    "tenancy.quota.gpus",
    "training.optim.beta",
    "monitoring.enabled",
    "services.chat.load_s",
    "storage.shared",
    "a.b.c",
]
words = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=20)
values = st.none() | st.booleans() | st.integers() | words | st.floats(allow_nan=False) | st.just(("spot", "on-demand"))


@settings(max_examples=80, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(where=st.sampled_from(EDITABLE) | st.tuples(st.sampled_from(sorted(TEXTS)), st.sampled_from(NEW)), value=values)
def test_an_edit_changes_one_value_and_no_other_line(where: tuple[str, str], value: Any) -> None:
    name, path = where
    before = TEXTS[name]
    after = apply(before, {path: value})
    assert value_at(after, path) == (list(value) if isinstance(value, tuple) else value)
    assert re.findall(r"#.*", after)[: before.count("#")] == re.findall(r"#.*", before) or "#" in str(value)
    kept = set(before.splitlines()) & set(after.splitlines())
    assert len(set(before.splitlines()) - kept) <= 2


def value_at(text: str, path: str) -> Any:
    node = yaml.safe_load(text)["config"]
    first, *rest = path.split(".")
    for key in ("slipway:" + first, *rest):
        node = next(item for item in node if item["name"] == key) if isinstance(node, list) else node[key]
    return node


@pytest.mark.parametrize(
    ("before", "patch", "after"),
    [
        ("a: 1  # why", {"a": 2}, "a: 2  # why"),
        ("a: {b: 1}  # why", {"a.c": 2}, "a: {b: 1, c: 2}  # why"),
        ("a: {}", {"a.c": 2}, "a: {c: 2}"),
        ("a:", {"a.c": 2}, "a: {c: 2}"),
        ("a: ~", {"a": "x"}, "a: x"),
        ("a:\n    b: 1  # one\n\n  # next\n  slipway:z: 0", {"a.c": 2}, "a:\n    b: 1  # one\n    c: 2\n\n  # next\n  slipway:z: 0"),
        ("a:\n    b: |\n      text\n  slipway:z: 0", {"a.c": 2}, "a:\n    b: |\n      text\n    c: 2\n  slipway:z: 0"),
        ("a:\n  - name: x\n    b: 1", {"a.x.c.d": 2}, "a:\n  - name: x\n    b: 1\n    c: {d: 2}"),
        ("a:\n    b:\n    - x\n    - y\n    c: 1", {"a.b": ("z",)}, "a:\n    b:\n      [z]\n    c: 1"),
        ("a: 'it''s'\r\n  slipway:z: 0", {"z": 1, "y": 2}, "a: 'it''s'\r\n  slipway:z: 1\r\n  slipway:y: 2"),
    ],
)  # fmt: skip
def test_an_edit_keeps_the_layout(before: str, patch: dict[str, Any], after: str) -> None:
    head = "# a stack\nconfig:\n  slipway:"
    assert apply(head + before, patch) == head + after


def test_a_value_that_others_share_is_not_changed_behind_their_backs() -> None:
    text = "config:\n  slipway:a: &size {cpus: 1}\n  slipway:b: *size\n"
    with pytest.raises(EditError, match="edit the file by hand"):
        apply(text, {"a.cpus": 2})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A project in a folder of its own, with one stack: prod, with `replaced` texts."""

    def make(replaced: dict[str, str]) -> Path:
        text = TEXTS["Pulumi.prod.yaml"]
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "stacks").mkdir(exist_ok=True)
        (tmp_path / "Pulumi.yaml").write_text("name: slipway\n")
        file = tmp_path / "stacks" / "Pulumi.prod.yaml"
        file.write_text(text)
        monkeypatch.chdir(tmp_path)
        return file

    return make


def slipway(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", "-s", "prod", *arguments])


BROKEN = {
    "    nodes: 2": "    nodes: 3  # more is better",
    "max_replicas: 8": "max_replicas: 20",
    "kv_gib: 24": "kv_gib: 60",
}


def test_fix_mends_what_has_a_patch_and_keeps_the_rest(project: Callable[..., Path]) -> None:
    file = project(BROKEN)
    assert slipway("--json").exit_code == 2
    done = slipway("--fix", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 0
    assert [finding["code"] for finding in document["fixed"]] == ["SLW101", "SLW103", "SLW202"]
    assert document["findings"] == []
    changed = set(file.read_text().splitlines()) - set(TEXTS["Pulumi.prod.yaml"].splitlines())
    assert len(changed) == 2
    assert "    nodes: 2  # more is better" in changed
    again = slipway("--fix", "--json")
    assert json.loads(again.stdout)["fixed"] == []


def test_a_fix_that_brings_another_error_to_light_goes_on(project: Callable[..., Path]) -> None:
    """Two ranks of three cannot share the batch once the gang is as small as its pool."""
    file = project({"    nodes: 2": "    nodes: 9", "max_nodes: 2": "max_nodes: 3", "usd_per_h: 140": "usd_per_h: 200"})
    done = slipway("--fix", "--json")
    assert done.exit_code == 0, done.stderr
    assert {"SLW101", "SLW301"} <= {finding["code"] for finding in json.loads(done.stdout)["fixed"]}
    assert check(load(file), plan(load(file))) == ()


def test_what_no_patch_mends_is_left_alone_and_refused(project: Callable[..., Path]) -> None:
    file = project({"usd_per_run: 4000": "usd_per_run: 1"})
    before = file.read_bytes()
    done = slipway("--fix")
    assert done.exit_code == 2
    assert "SLW702" in done.stderr
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_that_cannot_be_read_is_told_by_its_own_name_and_not_touched(project: Callable[..., Path]) -> None:
    file = project({"global_batch": "global_bach"})
    done = slipway("--fix")
    assert done.exit_code != 0
    assert str(done.exception).startswith("stacks/Pulumi.prod.yaml:")
    assert "global_bach" in file.read_text()


@settings(max_examples=6, deadline=None)
@given(
    nodes=st.integers(1, 9), batch=st.integers(1, 300), micro=st.integers(1, 64), most=st.integers(2, 40),
    kv_gib=st.floats(0.01, 80), cpus=st.floats(0.5, 9), pool=st.sampled_from(["train", "serve"]),
)  # fmt: skip
def test_a_fix_never_leaves_more_errors_than_there_were(
    tmp_path_factory: pytest.TempPathFactory,
    nodes: int,
    batch: int,
    micro: int,
    most: int,
    kv_gib: float,
    cpus: float,
    pool: str,
) -> None:
    chat = "services.chat"
    values = {
        "training.nodes": nodes, "training.global_batch": batch, "training.micro_batch": micro,
        f"{chat}.autoscaling.max_replicas": most, f"{chat}.kv_gib": kv_gib, f"{chat}.resources.cpus": cpus, f"{chat}.pool": pool,
    }  # fmt: skip
    file = tmp_path_factory.mktemp("fix") / "Pulumi.prod.yaml"
    file.write_text(apply(TEXTS["Pulumi.prod.yaml"], values))

    def errors() -> int:
        return sum(finding.severity == "error" for finding in check(load(file), plan(load(file))))

    before = errors()
    fixed = fix(file)
    assert errors() <= max(before - 1, 0) if fixed.applied else errors() == before
    assert fix(file).applied == ()


def test_what_is_refused_is_printed_to_the_letter(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets are YAML's, and no markup."""
    project({"[spot, on-demand]": "[on-demand, spot]"})
    monkeypatch.setattr("sys.argv", ["slipway", "render", "-s", "prod", "-o", "out"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert "Fix: [spot, on-demand], or [on-demand] alone" in capsys.readouterr().err


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_against_a_revision_shows_what_a_change_costs(project: Callable[..., Path]) -> None:
    folder = project({}).parents[1]
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "before")
    assert json.loads(slipway("--against", "HEAD", "--json").stdout)["changes"] == []
    project({"max_replicas: 8": "max_replicas: 4", "max_nodes: 9": "max_nodes: 5"})
    done = slipway("--against", "HEAD", "--json")
    found = {change["what"]: change for change in json.loads(done.stdout)["changes"]}
    assert (found["GPUs at most"]["before"], found["GPUs at most"]["after"]) == (25, 21)
    assert found["cost at most"]["after"] == pytest.approx(found["cost at most"]["before"] - 4 * 1.861)
    assert found["services.chat.replicas at most"]["after"] == 4
    assert "-6%" in slipway("--against", "HEAD").stderr


def test_against_a_folder(project: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    project({"steps: 40000": "steps: 80000"})
    done = slipway("--against", str(ROOT), "--json")
    found = {change["what"]: change for change in json.loads(done.stdout)["changes"]}
    assert found["training.time"]["after"] == pytest.approx(2 * found["training.time"]["before"])
    empty = tmp_path_factory.mktemp("empty")
    assert "no Pulumi.prod.yaml" in str(slipway("--against", str(empty)).exception)


@pytest.mark.parametrize("reference", ["no-such-branch", "--output=x", "HEAD:stacks"])
def test_against_nothing_is_refused(project: Callable[..., Path], reference: str) -> None:
    project({})
    done = slipway(f"--against={reference}")
    assert "neither a folder nor a Git revision" in str(done.exception)


def test_a_part_that_is_new_or_gone_is_a_change() -> None:
    whole, bare = plan(load(ROOT / "stacks/Pulumi.prod.yaml")), plan(load(ROOT / "stacks/Pulumi.local.yaml"))
    found = {change.what: change for change in changes(whole, bare)}
    assert found["pools.train.instance"].after is None
    assert found["pools.laptop.instance"].before is None


def test_manifests_of_others_are_checked_from_files_and_folders(tmp_path: Path) -> None:
    render(ROOT / "stacks" / "Pulumi.local.yaml", tmp_path / "ours")
    clean = CliRunner().invoke(app, ["check", str(tmp_path / "ours"), "--json"])
    assert clean.exit_code == 0
    document = json.loads(clean.stdout)
    assert document["manifests"] > 30
    assert document["findings"] == []
    pod = {"name": "x", "image": "x:1", "resources": {"requests": {"nvidia.com/gpu": 1}}}
    theirs = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [pod]}}
    (tmp_path / "pod.json").write_text(json.dumps(theirs))
    found = CliRunner().invoke(app, ["check", str(tmp_path / "pod.json")])
    assert found.exit_code == 2
    assert "SLW111 error Pod/x: container 'x' requests 1 of nvidia.com/gpu" in found.stderr


@pytest.mark.parametrize("text", ["a: [", "\xff"])
def test_files_that_are_no_manifests_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.yaml").write_text(text, encoding="latin-1")
    done = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert "not YAML in UTF-8" in str(done.exception)
    assert "no such file" in str(CliRunner().invoke(app, ["check", str(tmp_path / "none.yaml")]).exception)


@pytest.mark.parametrize("containers", [None, [], "web", [1]])
def test_pods_without_readable_containers_do_not_pass(tmp_path: Path, containers: object) -> None:
    pods = {"spec": {"containers": containers}}
    theirs = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": {"template": pods}}
    (tmp_path / "job.json").write_text(json.dumps(theirs))
    done = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert "Job/x: containers: " in str(done.exception)


SIZED = {
    "traffic: {rps: 40, prompt_tokens: 600, output_tokens: 150}": "traffic: {rps: 20}",
    "    nodes: 2\n": "    nodes: 2\n    parallelism: auto\n",
}


def test_people_see_latency_spot_and_what_auto_chose(project: Callable[..., Path], tmp_path: Path) -> None:
    project(SIZED)
    done = slipway("--html", str(tmp_path / "page.html"))
    assert done.exit_code == 0
    shown, written = done.stderr, Page((tmp_path / "page.html").read_text()).words
    for said in ("training.parallelism", "interruptions expected", "first token", "each token after it"):
        assert said in shown
        assert said in written
    assert "USD a million output tokens" in shown
    assert "a million output tokens" in written


def test_prices_of_another_region_are_said_to_be_that(project: Callable[..., Path]) -> None:
    project({"region: us-east-1": "region: eu-central-1"})
    assert "us-east-1, 2026" in slipway().stderr
    assert "those of eu-central-1 may differ" in slipway().stderr
    project({})
    assert "may differ" not in slipway().stderr


class Page(HTMLParser):
    """What a page holds; raises on tags that do not match."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def html_of(file: Path, *, against: bool = False) -> str:
    stack = load(file)
    planned = plan(stack)
    differs = changes(plan(load(ROOT / "stacks/Pulumi.prod.yaml")), planned) if against else None
    return page(planned, check(stack, planned), stack="prod", changes=differs, against="main" if against else None)


def test_the_page_fetches_nothing(stack_path: Path) -> None:
    text = html_of(stack_path, against=True)
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert not {"src", "href", "onclick"} & {name for _, attributes in found.tags for name in attributes}
    assert "url(" not in text
    assert "@import" not in text
    assert len([tag for tag, _ in found.tags if tag == "svg"]) >= 2


def test_the_page_escapes_what_the_stack_file_says(changed: Callable[..., Path]) -> None:
    attack = "<script>alert('&')</script>"
    text = html_of(changed("prod", {"images.router": attack + ":latest"}))
    assert attack not in text
    assert attack in Page(text).words


def test_the_page_shows_what_is_refused(changed: Callable[..., Path]) -> None:
    words = Page(html_of(changed("prod", {"services.0.kv_gib": 60, "training.nodes": 9}))).words
    assert "refused: 3 errors" in words
    assert "SLW202" in words
    assert re.search(r"kv_gib: \d+\.\d", words)


def test_the_page_is_written_whole_and_is_the_same_each_time(project: Callable[..., Path], tmp_path: Path) -> None:
    project({})
    for name in ("one.html", "two.html"):
        assert slipway("--html", str(tmp_path / name)).exit_code == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    done = slipway("--html", str(tmp_path / "nowhere" / "page.html"))
    assert "Fix: give --html a file" in str(done.exception)
