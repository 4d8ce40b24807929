"""The stack brought to the cluster, by whichever of the two ways this machine has; either way waited for and told alike.

`pulumi up`, through the Automation API, where the CLI and its Kubernetes provider are; else `slipway apply`, which renders and
applies server-side. Waiting is `slipway status --wait`'s for both.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
PROVIDER = "pulumi-resource-kubernetes"


def has_pulumi() -> bool:
    """Whether `pulumi up` can make Kubernetes objects here, without fetching anything."""
    if not shutil.which("pulumi"):
        return False
    if shutil.which(PROVIDER):
        return True
    listed = subprocess.run(["pulumi", "plugin", "ls"], capture_output=True, text=True)
    return listed.returncode == 0 and "kubernetes" in listed.stdout


def pulumi_up(project: Path, *, root: Path, state: Path, kubeconfig: Path, tell: Callable[[str], None]) -> Json:
    """`pulumi up` of the stack `dev` of `project`, with its state in a folder: how many objects were created, changed, removed."""
    from pulumi import automation

    if not (project / ".venv").exists():
        shutil.copy(root / "stacks" / "__main__.py", project / "stacks")
        (project / ".venv").symlink_to(root / ".venv")
    state.mkdir(parents=True, exist_ok=True)
    environment = {
        "PULUMI_BACKEND_URL": f"file://{state}",
        "PULUMI_CONFIG_PASSPHRASE": "",
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "PYTHONPATH": str(root),
        "KUBECONFIG": str(kubeconfig),
    }
    # The CLI is told by an environment of its own, the library that starts it by this process's.
    options = automation.LocalWorkspaceOptions(env_vars=dict(os.environ) | environment)
    stack = automation.create_or_select_stack("dev", work_dir=str(project), opts=options)
    changes = stack.up(on_output=tell, suppress_outputs=True, suppress_progress=True).summary.resource_changes or {}
    counted = {"created": "create", "changed": "update", "removed": "delete"}
    return {name: changes.get(operation, 0) for name, operation in counted.items()}
