"""Inside an image's build: the root filesystem of an image that starts from nothing. No shell, no package manager, nothing setuid.

    python -m inside.root OUT                    this Python, and what it and the wheels of PyPI are linked to
    python -m inside.root OUT PROGRAM            that program instead, and what it is linked to
    python -m inside.root --check OUT FOLDER…    refuse where a library of FOLDER wants one that OUT does not have

A pod's runtime starts its program directly, so that there is nothing in it for an intruder to work with.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .install import compile_all

# Modules of the standard library that install, test or draw: no server does.
WITHOUT = frozenset(
    {
        *("__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages"),
        *("test", "tests", "tkinter", "turtledemo", "venv"),
    }
)
# What wheels may take for granted (https://peps.python.org/pep-0600/), as far as servers use it; and how glibc looks names up.
LIBRARIES = (
    *("libc", "libdl", "libexpat", "libgcc_s", "libm", "libnss_dns", "libnss_files", "libpthread", "libresolv"),
    *("librt", "libstdc++", "libutil", "libz"),
)
FILES = (
    *("/etc/ld.so.conf", "/etc/nsswitch.conf", "/etc/os-release"),
    # Where OpenSSL looks for its settings and the authorities.
    *("/usr/lib/ssl/certs", "/usr/lib/ssl/openssl.cnf"),
)
TREES = ("/etc/ld.so.conf.d", "/usr/share/zoneinfo")
CERTIFICATES = Path("/etc/ssl/certs")
USER = 65532
USERS = f"root:x:0:0:root:/:/nonexistent\nslipway:x:{USER}:{USER}:slipway:/tmp:/nonexistent\n"
GROUPS = f"root:x:0:\nslipway:x:{USER}:\n"
# Where a container's runtime mounts things, and what programs take for scratch space.
EMPTY = ("dev", "proc", "run", "sys")
SCRATCH = ("tmp", "var/tmp")


class Root:
    """A folder that becomes an image's `/`: what it takes lies in it where it lay, with every link on the way."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folders: set[Path] = set()
        """Taken, and no link on the way to them."""

    def at(self, path: Path) -> Path:
        return self.out / path.relative_to("/")

    def take(self, path: Path) -> None:
        known = path.parent in self.folders
        walked, ahead = (path.parent, [path.name]) if known else (Path("/"), list(path.parts[1:]))
        while ahead:
            walked /= ahead.pop(0)
            there = self.at(walked)
            if walked.is_symlink():
                if not there.is_symlink():
                    there.symlink_to(walked.readlink())
                target = Path(os.path.normpath(walked.parent / walked.readlink()))
                walked, ahead = Path("/"), [*target.parts[1:], *ahead]
            elif walked.is_dir():
                there.mkdir(exist_ok=True)
                self.folders.add(walked)
            elif not there.exists():
                shutil.copyfile(walked, there)
                there.chmod(0o755 if os.access(walked, os.X_OK) else 0o644)

    def take_tree(self, top: Path, *, without: frozenset[str] = frozenset()) -> None:
        """Files, and links that lead to something."""
        for folder, folders, files in os.walk(top):
            folders[:] = sorted(set(folders) - without)
            for path in (Path(folder, name) for name in sorted(files)):
                if path.exists():
                    self.take(path)

    def write(self, path: str, text: str) -> None:
        self.at(Path(path)).parent.mkdir(parents=True, exist_ok=True)
        self.at(Path(path)).write_text(text)


def make(out: Path, program: Path | None) -> None:
    """Make the root of `program`, or of this Python, in the folder `out`."""
    root = Root(out)
    out.mkdir(parents=True)
    for name in (*EMPTY, *SCRATCH):
        (out / name).mkdir(parents=True)
    for name in SCRATCH:
        (out / name).chmod(0o1777)
    root.write("/etc/passwd", USERS)
    root.write("/etc/group", GROUPS)
    for name in (name for name in FILES if Path(name).exists()):
        root.take(Path(name))
    for name in TREES:
        root.take_tree(Path(name))
    _take_certificates(root)
    if program:
        root.take(program)
    else:
        _take_python(root)
    _take_libraries(root)
    # The loader's cache of `out`, for libraries outside its own folders.
    ldconfig = shutil.which("ldconfig", path="/sbin:/usr/sbin")
    subprocess.run([str(ldconfig), "-X", "-r", str(out)], check=True)  # noqa: S603


def check(out: Path, folders: list[Path]) -> None:
    """Every library of the system that those in `folders` are linked to is in `out`. Exits with their names where one is not."""
    missing: set[str] = set()
    for folder in folders:
        for path in folder.rglob("*.so*"):
            missing |= {str(one) for one in linked(path) if not _is_in(one, [out, *folders], out)}
    if missing:
        sys.exit(f"error: the image lacks {', '.join(sorted(missing))}. Fix: LIBRARIES in {Path(__file__).name}")


def linked(path: Path) -> list[Path]:
    """What the loader loads with a program or a library; nothing for what is neither."""
    done = subprocess.run([str(_loader()), "--list", str(path)], capture_output=True, text=True, check=False)  # noqa: S603
    return [Path(found) for found in re.findall(r"(/\S+) \(0x", done.stdout)]


def _is_in(library: Path, folders: list[Path], out: Path) -> bool:
    return any(library.is_relative_to(folder) for folder in folders) or (out / library.relative_to("/")).exists()


def _take_python(root: Root) -> None:
    """Interpreter and standard library, compiled."""
    root.take(Path(sys.executable))
    stdlib = Path(sysconfig.get_path("stdlib"))
    root.take_tree(stdlib, without=WITHOUT)
    root.take(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
    compile_all(root.at(stdlib), out=root.out)


def _take_libraries(root: Root) -> None:
    root.take(_loader())
    folder = next(path.parent for path in linked(Path(sys.executable)) if path.name.startswith("libc."))
    for name in LIBRARIES:
        for path in folder.glob(f"{name}.so.*"):
            root.take(path)
    for path in list(_programs(root.out)):
        for library in linked(path):
            root.take(Path("/") / library.relative_to(root.out) if library.is_relative_to(root.out) else library)


def _programs(out: Path) -> Iterator[Path]:
    """Files in `out` that a loader reads."""
    for path in out.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def _take_certificates(root: Root) -> None:
    """Each authority's file by the name that OpenSSL looks for, and all in one. What the machine that builds adds stays out."""
    whole = CERTIFICATES / "ca-certificates.crt"
    authorities = sorted(path for path in CERTIFICATES.glob("*") if path != whole and path.exists())
    for path in authorities:
        root.take(path)
    root.write(str(whole), "".join(path.read_text() for path in authorities if path.suffix == ".pem"))


def _loader() -> Path:
    """glibc's: `/lib64/ld-linux-x86-64.so.2`, `/lib/ld-linux-aarch64.so.1`."""
    return next(path for folder in ("/lib64", "/lib") for path in sorted(Path(folder).glob("ld-linux-*.so.*")))


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    if first == "--check":
        check(Path(rest[0]), [Path(folder) for folder in rest[1:]])
    else:
        make(Path(first), Path(rest[0]) if rest else None)
