"""Programs of the distribution: those on PATH, and the rest from Debian's packages, unpacked into the cache.

They are unpacked and not installed: nothing of the machine changes, no service starts, and there is nothing to remove.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.clouds.local.making import making, tied
from infra.clouds.local.places import Unable, digest_of
from infra.clouds.local.shell import run

Say = Callable[[str], None]

# Program → package that has it.
NODE_PROGRAMS = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "ip": "iproute2",
}
# Of these the files are wanted, wherever they would be installed: network plugins, and what sleeps in a pod's sandbox.
NODE_FILES = ("containernetworking-plugins", "busybox-static")
IMAGE_PROGRAMS = {"buildah": "buildah", "mmdebstrap": "mmdebstrap"}


@dataclass(frozen=True)
class Debian:
    """Where the programs are: on PATH, or under `root`."""

    root: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment in which they find each other and their libraries."""
        folders = [str(self.root / folder) for folder in ("usr/sbin", "usr/bin", "sbin", "bin")]
        path = [*folders, os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]
        libraries = [str(folder) for folder in sorted(self.root.glob("usr/lib/*-linux-gnu"))]
        return os.environ | {"PATH": ":".join(path), "LD_LIBRARY_PATH": ":".join(libraries)}

    def file(self, name: str) -> Path:
        """A file that one of the packages has, by the end of its path."""
        return next(path for path in sorted(self.root.rglob(Path(name).name)) if str(path).endswith(name))


def programs(cache: Path, wanted: dict[str, str], *, files: Sequence[str] = (), say: Say) -> Debian:
    """Have every program of `wanted`, and the files of the packages `files`. Raises `Unable`."""
    missing = [package for program, package in wanted.items() if not _on_path(program)]
    packages = sorted({*missing, *files})
    # The same names mean other bytes on another release.
    root = cache / f"debian-{digest_of([*map(str.encode, packages), _release()])}"
    if packages and not root.exists():
        if not shutil.which("apt-get"):
            raise Unable(f"{', '.join(packages)} missing, and this is no Debian. Fix: install them, or Docker and kind")
        say(f"fetching Debian's {', '.join(packages)}: unpacked into {root}, nothing is installed")
        _unpack(packages, root)
    return Debian(root)


def _unpack(packages: Sequence[str], root: Path) -> None:
    with making(root) as tree:
        if tree is None:  # another process has unpacked them meanwhile
            return
        debs = tree / "debs"
        (debs / "partial").mkdir(parents=True)
        fetch = [
            *("apt-get", "install", "--yes", "--quiet", "--download-only", "--reinstall", "--no-install-recommends"),
            *("-o", f"Dir::Cache::archives={debs}", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root"),
            *packages,
        ]
        done = _fetch(fetch)
        if done.returncode:
            # Fresh lists only where the ones that are there do not do: they take seconds.
            run(*tied("apt-get", "update", "--quiet"))
            done = _fetch(fetch)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise Unable(
                f"apt-get cannot fetch {', '.join(packages)} ({why}). Fix: apt-get install {' '.join(packages)}"
            )
        for deb in sorted(debs.glob("*.deb")):
            run("dpkg-deb", "-x", deb, tree).check_returncode()
        shutil.rmtree(debs)


def _fetch(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return run(*tied(*command), env=os.environ | {"LC_ALL": "C"})


def _on_path(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


def _release() -> bytes:
    release = Path("/etc/os-release")
    return release.read_bytes() if release.exists() else b""
