"""Inside an image's build: what it installs, as lists of packages and versions. `uv` resolves, constraints.txt pins.

    python -m inside.lists trainer [DRIVER…]    shared.txt: what trainer and server both need; own.txt: what the trainer needs besides

The layers are made from these lists alone, so that a change of pyproject.toml or constraints.txt that changes no list builds none
of them again. With ACCELERATOR=cpu, torch comes without the gigabytes of CUDA: PyPI has no other torch for Linux.
"""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from . import without_cuda

PACKAGES = ("trainer", "serving")
FLAGS = ("--quiet", "--no-cache", "--system-certs", "--no-header", "--no-annotate")


def main(package: str, drivers: list[str]) -> None:
    """Write both lists into the working directory, where pyproject.toml and constraints.txt are."""
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    both, besides = wanted(extras, package, drivers)
    overrides = without_cuda.OVERRIDES if os.environ["ACCELERATOR"] == "cpu" else []
    shared = resolve(both, overrides)
    Path("shared.txt").write_text(_lines(shared))
    Path("own.txt").write_text(_lines(set(resolve(besides, overrides)) - set(shared)))


def wanted(extras: dict[str, list[str]], package: str, drivers: Iterable[str]) -> tuple[list[str], list[str]]:
    """What every package asks for itself; and what `package` asks for besides, with `drivers`."""
    both = set(extras[PACKAGES[0]]).intersection(*(extras[name] for name in PACKAGES))
    return sorted(both), sorted({*extras[package], *drivers} - both)


def resolve(requirements: list[str], overrides: list[str]) -> list[str]:
    """`requirements` and all that they need, here: `name==version`. An override whose marker never holds leaves a package out."""
    Path("overrides.txt").write_text(_lines(overrides))
    command = ["/uv/bin/uv", "pip", "compile", *FLAGS, "--python", sys.executable]
    command += ["-c", "constraints.txt", "--overrides", "overrides.txt", "-"]
    done = subprocess.run(command, input=_lines(requirements), check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return done.stdout.splitlines()


def _lines(of: Iterable[str]) -> str:
    return "".join(f"{one}\n" for one in sorted(of))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
