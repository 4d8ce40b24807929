"""Compiling the kernels: once, whoever starts at the same time, and for every user of the machine."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from serving.kernels import build

COMPILER = """#!/bin/sh
echo "$@" >> {log}
sleep 0.2
while [ "$1" != -o ]; do shift; done
{then}
"""


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """The folder as it is installed, with nothing compiled."""
    folder = tmp_path / "kernels"
    shutil.copytree(build.HERE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def start(folder: Path, *, then: str) -> subprocess.Popen[str]:
    """`build.py`, with a compiler that notes its calls and then does what `then` says."""
    compiler = folder / "c++"
    compiler.write_text(COMPILER.format(log=folder / "calls", then=then))
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, str(folder / "build.py")]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_processes_that_start_together_compile_once(kernels: Path) -> None:
    processes = [start(kernels, then='echo library > "$2"; chmod 700 "$2"') for _ in range(4)]
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(answers) == 1
    assert len((kernels / "calls").read_text().splitlines()) == len(build.LEVELS)
    made = [Path(line) for line in answers.pop().splitlines()]
    assert all(path.read_text() == "library\n" for path in made)
    assert all(path.stat().st_mode & stat.S_IROTH for path in made)  # an image is built by root and run by another


def test_a_failed_compilation_leaves_nothing_that_looks_whole(kernels: Path) -> None:
    process = start(kernels, then='echo half > "$2"; echo "no such instruction" >&2; exit 1')
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("error: ")
    assert "no such instruction" in error
    assert len(error.splitlines()) == 1
    assert not [*kernels.rglob("*.so")]
