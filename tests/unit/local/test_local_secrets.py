"""Secrets of the user's own: kept where nobody else reads them, seen by pods without a copy, asked for by name when missing."""

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.cli.project import Refusal
from infra.cli.secret import app
from infra.local.addresses import AddressBook
from infra.local.objects import ManifestError, Manifests
from infra.local.plan import Planner, PodPlan
from infra.local.secrets import MOST_BYTES, Secrets

VALUE = "s3cret-value"


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path / "config" / "secrets", "slipway local secret set -s x")


def planned(secrets: Secrets, state: Path, *, objects: tuple[dict, ...] = (), **pod: object) -> PodPlan:
    """The plan of a Deployment whose container and volumes have `pod`."""
    container = {"name": "main", "command": ["python", "-V"], **{k: v for k, v in pod.items() if k != "volumes"}}
    spec = {"containers": [container], "volumes": pod.get("volumes", [])}
    labels = {"metadata": {"labels": {"app": "web"}}, "spec": spec}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}}
    manifests = Manifests((*objects, deployment | {"spec": {"replicas": 1, "template": labels}}))
    book = AddressBook()
    book.update(manifests)
    return Planner(manifests=manifests, book=book, state_dir=state, secrets=secrets).pod(manifests.workloads[0], 0)


def mount(name: str, **more: object) -> dict:
    volume = {"name": "keys", "secret": {"secretName": name, **more}}
    return {"volumes": [volume], "volumeMounts": [{"name": "keys", "mountPath": "/keys"}]}


def test_a_value_is_its_owners_alone(secrets: Secrets) -> None:
    path = secrets.set("chat-keys", "keys.json", VALUE.encode())
    assert path.read_text() == VALUE
    for each in (path, path.parent, secrets.directory):
        assert not each.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    secrets.set("chat-keys", "keys.json", b"another")
    assert path.read_text() == "another"
    assert secrets.names() == ["chat-keys"]
    assert secrets.remove("chat-keys")
    assert not secrets.remove("chat-keys")
    assert secrets.names() == []


def test_the_command_line_keeps_lists_and_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    run = CliRunner()
    assert run.invoke(app, ["set", "wandb", "WANDB_API_KEY", "-s", "x"], input=f"{VALUE}\n").exit_code == 0
    assert (tmp_path / "slipway" / "secrets" / "x" / "wandb" / "WANDB_API_KEY").read_text() == VALUE
    listed = run.invoke(app, ["list", "-s", "x", "--json"])
    assert json.loads(listed.stdout) == {"stack": "x", "secrets": {"wandb": ["WANDB_API_KEY"]}}
    assert VALUE not in listed.output
    assert run.invoke(app, ["remove", "wandb", "-s", "x"]).exit_code == 0
    again = run.invoke(app, ["remove", "wandb", "-s", "x"])
    assert isinstance(again.exception, Refusal)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("../up", "k", b"v"),
        ("Up", "k", b"v"),
        ("", "k", b"v"),
        ("a", "../k", b"v"),
        ("a", "..", b"v"),
        ("a", "k/l", b"v"),
        ("a", "", b"v"),
        ("a", "k", b""),
        ("a", "k", b"x" * (MOST_BYTES + 1)),
    ],
)
def test_what_no_secret_can_be_is_refused(secrets: Secrets, name: str, key: str, value: bytes) -> None:
    with pytest.raises(ValueError, match="Secret"):
        secrets.set(name, key, value)
    assert not secrets.directory.exists()


def test_a_pod_sees_files_by_a_link_and_no_copy_is_made(secrets: Secrets, tmp_path: Path) -> None:
    path = secrets.set("chat-keys", "keys.json", VALUE.encode())
    plan = planned(secrets, tmp_path / "state", **mount("chat-keys"))
    assert list(plan.links.values()) == [path]
    assert [link.name for link in plan.links] == ["keys.json"]
    assert plan.files == {}
    renamed = planned(secrets, tmp_path, **mount("chat-keys", items=[{"key": "keys.json", "path": "a/b.json"}]))
    assert [link.parts[-2:] for link in renamed.links] == [("a", "b.json")]


def test_variables_are_of_one_key_or_of_all(secrets: Secrets, tmp_path: Path) -> None:
    secrets.set("wandb", "WANDB_API_KEY", VALUE.encode())
    one = {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "WANDB_API_KEY"}}}
    assert planned(secrets, tmp_path, env=[one]).containers[0].env["TOKEN"] == VALUE
    every = [{"secretRef": {"name": "wandb"}}]
    assert planned(secrets, tmp_path, envFrom=every).containers[0].env["WANDB_API_KEY"] == VALUE


@pytest.mark.parametrize(
    ("pod", "asks"),
    [
        (mount("chat-keys"), "chat-keys KEY < FILE"),
        (mount("chat-keys", items=[{"key": "keys.json", "path": "k"}]), "chat-keys keys.json < FILE"),
        ({"envFrom": [{"secretRef": {"name": "chat-keys"}}]}, "chat-keys KEY < FILE"),
        (
            {"env": [{"name": "T", "valueFrom": {"secretKeyRef": {"name": "chat-keys", "key": "token"}}}]},
            "chat-keys token < FILE",
        ),
        (mount("../../etc"), "../../etc KEY < FILE"),
    ],
)
def test_one_that_is_missing_is_refused_with_the_command_that_sets_it(
    secrets: Secrets, tmp_path: Path, pod: dict, asks: str
) -> None:
    with pytest.raises(ManifestError) as caught:
        planned(secrets, tmp_path, **pod)
    assert "(Deployment/web). Set it: slipway local secret set -s x " + asks in str(caught.value)


def test_one_that_may_be_missing_is_left_out(secrets: Secrets, tmp_path: Path) -> None:
    assert planned(secrets, tmp_path, **mount("chat-keys", optional=True)).links == {}
    reference = {"name": "chat-keys", "key": "token", "optional": True}
    plan = planned(secrets, tmp_path, env=[{"name": "T", "valueFrom": {"secretKeyRef": reference}}])
    assert "T" not in plan.containers[0].env


def test_one_that_others_may_read_is_refused(secrets: Secrets, tmp_path: Path) -> None:
    path = secrets.set("chat-keys", "keys.json", VALUE.encode())
    path.chmod(0o640)
    with pytest.raises(ManifestError, match=f"chmod 600 {path}") as caught:
        planned(secrets, tmp_path, **mount("chat-keys"))
    assert VALUE not in str(caught.value)


def test_the_manifests_own_secret_comes_first(secrets: Secrets, tmp_path: Path) -> None:
    secrets.set("chat-keys", "keys.json", VALUE.encode())
    own = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "chat-keys"}, "stringData": {"keys.json": "own"}}
    plan = planned(secrets, tmp_path, objects=(own,), **mount("chat-keys"))
    assert (list(plan.files.values()), plan.links) == (["own"], {})
