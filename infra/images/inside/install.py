"""Inside an image's build: install a list of packages, and compile them. Standard library only; `uv` does the work.

python -m inside.install /venv shared.txt    into the virtual environment that both images have
python -m inside.install /own own.txt        beside it, for the same Python
"""

import os
import subprocess
import sys
from pathlib import Path

from . import without_cuda

VENV = Path("/venv")


def main(folder: Path, packages: Path) -> None:
    """Install what `packages` lists, which is all that it needs, and no more."""
    into = [] if folder == VENV else ["--target", str(folder)]
    flags = ["--quiet", "--no-cache", "--system-certs", "--no-deps", "--python", f"{VENV}/bin/python"]
    subprocess.run(["uv", "pip", "install", *flags, *into, "-r", str(packages)], check=True)  # noqa: S603, S607
    (folder / ".lock").unlink(missing_ok=True)  # uv's, for everybody to write
    if folder == VENV and os.environ["ACCELERATOR"] == "cpu":
        without_cuda.stand_in(next(VENV.glob("lib/python3*/site-packages/torch/lib")))
    compile_all(folder)


def compile_all(folder: Path, *, out: Path = Path("/")) -> None:
    """Bytecode that is taken as it stands: files of an image have other times, and pods cannot write.

    `out`: folder that is the image's `/`.
    """
    flags = ["-q", "--invalidation-mode", "unchecked-hash", "-s", str(out), "-p", "/"]
    command = [sys.executable, "-m", "compileall", *flags, str(folder)]
    # Its exit says nothing: packages ship templates that are no Python. The order of sets is fixed, for the same bytes every time.
    subprocess.run(command, check=False, env=os.environ | {"PYTHONHASHSEED": "0"})  # noqa: S603


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
