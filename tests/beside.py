"""Packages that cannot be among this project's own, since they ask for other versions of what it stands on: put beside it.

Each set has a folder of its own in the cache, for a program in a process of its own to find first on its PYTHONPATH.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.clouds.local import Places

CACHE = Places.of_user().cache / "test-packages"


def installed_beside(*requirements: str, dependencies: bool = True) -> Path:
    """The folder that holds `requirements`. Skips the test where they cannot be had."""
    about = [*requirements, str(dependencies), sys.version, sys.platform]
    folder = CACHE / f"{requirements[0]}-{hashlib.sha256(' '.join(about).encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    command = [Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--target", unfinished, *requirements]
    index = os.environ.get("PIP_INDEX_URL")  # uv reads no pip configuration
    command += ["--default-index", index] if index else []
    ended = subprocess.run(
        [*command, *([] if dependencies else ["--no-deps"])], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        shutil.rmtree(unfinished, ignore_errors=True)
        pytest.skip(f"{', '.join(requirements)} cannot be had: {ended.stderr.strip().splitlines()[-1]}")
    try:
        unfinished.rename(folder)
    except OSError:  # another run was sooner
        shutil.rmtree(unfinished)
    return folder
