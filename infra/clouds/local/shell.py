"""Running a program to its end, without a shell, and having what it said."""

import subprocess
from pathlib import Path


def run(
    *command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None, stdin: str = ""
) -> "subprocess.CompletedProcess[str]":
    """`returncode`, `stdout`, `stderr`. Raises OSError where there is no such program."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, cwd=cwd, input=stdin)  # noqa: S603
