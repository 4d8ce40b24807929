"""Where a model came from: the revision of the code and the machine it ran on."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def source_revision() -> str:
    """SOURCE_REVISION where the image was built with one, else the checkout's commit, else 'unknown'."""
    if revision := os.environ.get("SOURCE_REVISION"):
        return revision
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def hardware() -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    return {"device": device, "ranks": world, "threads": torch.get_num_threads(), "torch": torch.__version__}
