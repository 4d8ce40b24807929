"""Inside an image's build: install the Python packages of an image. Standard library only; `uv` does the work.

    python -m inside.install shared             what trainer and serving both need, into /venv: one layer for both images
    python -m inside.install trainer [DRIVER…]  what the trainer needs besides, into /own

With ACCELERATOR=cpu, torch comes without the gigabytes of CUDA: PyPI has no other torch for Linux.
"""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, distributions
from pathlib import Path

from . import without_cuda

SHARED, OWN = Path("/venv"), Path("/own")
PACKAGES = ("trainer", "serving")


def main(package: str, drivers: list[str]) -> None:
    """Install and compile `package`'s dependencies, or those that are shared."""
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    lists: list[list[str]] = [extras[name] for name in PACKAGES]
    shared = set(lists[0]).intersection(*lists[1:])
    if package == "shared":
        overrides = without_cuda.OVERRIDES if os.environ["ACCELERATOR"] == "cpu" else []
        install(sorted(shared), into=["--python", f"{SHARED}/bin/python"], overrides=overrides)
        if overrides:
            without_cuda.stand_in(site(SHARED) / "torch" / "lib")
        compile_all(SHARED)
    else:
        there = [f"{name_of(one)} ; sys_platform == 'none'" for one in distributions(path=[str(site(SHARED))])]
        wanted = sorted({*extras[package], *drivers} - shared)
        install(wanted, into=["--python", f"{SHARED}/bin/python", "--target", str(OWN)], overrides=there)
        compile_all(OWN)


def install(requirements: list[str], *, into: list[str], overrides: list[str]) -> None:
    """By uv, at the versions of constraints.txt. An override whose marker never holds leaves a package out."""
    Path("requirements.txt").write_text("\n".join(requirements) + "\n")
    Path("overrides.txt").write_text("\n".join(overrides) + "\n")
    lists = ["-r", "requirements.txt", "-c", "constraints.txt", "--overrides", "overrides.txt"]
    flags = ["--quiet", "--no-cache", "--system-certs"]
    command = ["/uv/bin/uv", "pip", "install", *flags, *into, *lists]
    subprocess.run(command, check=True)  # noqa: S603


def site(venv: Path) -> Path:
    return next(venv.glob("lib/python3*/site-packages"))


def name_of(distribution: Distribution) -> str:
    return distribution.metadata["Name"]


def compile_all(folder: Path) -> None:
    """Bytecode that is taken as it stands: files of an image have other times, and pods cannot write."""
    command = [f"{SHARED}/bin/python", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(folder)]
    # Its exit says nothing: packages ship templates that are no Python.
    subprocess.run(command, check=False)  # noqa: S603


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
