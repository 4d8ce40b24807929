"""The Pulumi CLI and `render` run the very same program: `pulumi preview` plans the objects that `render` writes."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.render import run
from infra.spec import load

ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.cli,
    pytest.mark.skipif(shutil.which("pulumi") is None, reason="the Pulumi CLI is not on PATH"),
]


def need_provider(name: str) -> None:
    """Skip unless Pulumi's provider `name` is on PATH or among the installed plugins."""
    if shutil.which(f"pulumi-resource-{name}"):
        return
    done = subprocess.run(["pulumi", "plugin", "ls", "--json"], capture_output=True, text=True, timeout=60)
    if done.returncode or name not in done.stdout:
        pytest.skip(f"Pulumi has no {name} provider installed")


@pytest.fixture
def pulumi(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The CLI in a copy of the project, whose stack files it rewrites, with its state in a directory; no cluster, no account."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(ROOT / "Pulumi.yaml", project)
    shutil.copytree(ROOT / "stacks", project / "stacks")
    (project / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / "state").mkdir()
    environment = os.environ | {
        "PULUMI_BACKEND_URL": f"file://{tmp_path / 'state'}",
        "PULUMI_CONFIG_PASSPHRASE": "",
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "PYTHONPATH": str(ROOT),
        "KUBECONFIG": os.devnull,
    }

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["pulumi", *words, "--non-interactive"],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )

    need_provider("kubernetes")
    return command


@pytest.mark.parametrize("name", ["local", "dev", "staging", "prod"])
def test_preview_plans_what_render_writes(pulumi: Callable[..., Any], name: str) -> None:
    if load(ROOT / "stacks" / f"Pulumi.{name}.yaml").images.registry:
        need_provider("docker-build")
    assert pulumi("stack", "init", name).returncode == 0
    done = pulumi("preview", "-s", name, "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    steps = json.loads(done.stdout)["steps"]
    planned = [s["newState"]["inputs"] for s in steps if s["newState"]["type"].startswith("kubernetes:")]
    rendered = run(ROOT / "stacks" / f"Pulumi.{name}.yaml").manifests
    assert {key(manifest) for manifest in planned} == {key(manifest) for manifest in rendered}
    by_key = {key(manifest): manifest for manifest in planned}
    for manifest in rendered:
        assert by_key[key(manifest)].get("spec") == manifest.get("spec"), key(manifest)


def key(manifest: dict[str, Any]) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def test_a_bad_stack_file_is_one_line_with_its_place(pulumi: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "project" / "stacks" / "Pulumi.dev.yaml"
    file.write_text(file.read_text().replace("slipway:services:", "slipway:servicez:"))
    assert pulumi("stack", "init", "dev").returncode == 0
    done = pulumi("preview", "-s", "dev")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "Traceback" not in said
    assert "did you mean `services`?" in said
    assert "Pulumi.dev.yaml:" in said
