"""The policy pack run by the real CLI, on a program of somebody else's: `pulumi preview --policy-pack infra/policy`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_preview import ROOT, need_provider

pytestmark = [
    pytest.mark.cli,
    pytest.mark.skipif(shutil.which("pulumi") is None, reason="the Pulumi CLI is not on PATH"),
]

PROGRAM = """
from pulumi_kubernetes.apps.v1 import Deployment

container = {"name": "c", "image": IMAGE, "resources": RESOURCES, "security_context": {"run_as_non_root": True}}
pod = {"containers": [container], "tolerations": [{"operator": "Exists"}]}
Deployment(
    "web",
    metadata={"name": "web", "namespace": "default"},
    spec={"selector": {"match_labels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": pod}},
)
"""
GPU = '{"nvidia.com/gpu": "1"}'


def preview(project: Path, *, image: str, resources: str) -> subprocess.CompletedProcess[str]:
    """The CLI on such a Deployment, with its state in a directory; no cluster, no account."""
    (project / "state").mkdir()
    (project / "Pulumi.yaml").write_text(
        f"name: others\nruntime: {{name: python, options: {{virtualenv: {ROOT / '.venv'}}}}}\n"
    )
    (project / "__main__.py").write_text(PROGRAM.replace("IMAGE", repr(image)).replace("RESOURCES", resources))
    environment = os.environ | {
        "PULUMI_BACKEND_URL": f"file://{project / 'state'}",
        "PULUMI_CONFIG_PASSPHRASE": "",
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "KUBECONFIG": os.devnull,
    }

    def pulumi(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["pulumi", *words, "--non-interactive"]
        return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=180)

    assert pulumi("stack", "init", "dev").returncode == 0
    return pulumi("preview", "-s", "dev", "--policy-pack", str(ROOT / "infra" / "policy"))


def test_what_the_api_server_would_refuse_stops_a_preview(tmp_path: Path) -> None:
    need_provider("kubernetes")
    done = preview(tmp_path, image="x/y:latest", resources=f'{{"requests": {GPU}}}')
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert "[mandatory]  SLW111" in said
    assert "[advisory]  SLW602" in said
    assert "Deployment/default/web: x/y:latest is whatever was pushed last. Fix: a version or a digest" in said


def test_what_is_only_advised_does_not(tmp_path: Path) -> None:
    need_provider("kubernetes")
    done = preview(tmp_path, image="x/y:latest", resources=f'{{"requests": {GPU}, "limits": {GPU}}}')
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "SLW111" not in said
    assert "[advisory]  SLW602" in said
