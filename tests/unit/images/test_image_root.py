"""The root filesystem that images start from: a program runs in it as nobody, and there is nothing else to run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import envoy
import pytest

from infra.images.inside import root

ENVOY = Path(next(iter(envoy.__path__)), "_bin", "envoy")
# Everything that starts other programs, or brings some.
UNWANTED = {"ash", "bash", "busybox", "dash", "sh", "apt", "apt-get", "dpkg", "env", "perl", "pip", "pip3", "su", "uv"}
CHROOT = shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin") or ""
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs Linux and root, to run a program in a root of its own"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This Python's root."""
    out = tmp_path_factory.mktemp("root") / "image"
    root.make(out, None)
    return out


def inside(out: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run in `out` as the user that pods run as."""
    words = [CHROOT, "--userspec=65532:65532", out, *command]
    return subprocess.run(words, capture_output=True, text=True, env={"PATH": "/nowhere", "HOME": "/tmp"})


def test_python_and_its_libraries_run_in_it(made: Path) -> None:
    code = """
import asyncio, ctypes, getpass, hashlib, json, lzma, multiprocessing, os, socket, sqlite3, ssl, uuid, zlib, zoneinfo
socket.getaddrinfo('127.0.0.1', 80)
ssl.create_default_context()
print(len(os.listdir(ssl.get_default_verify_paths().capath)), getpass.getuser(), asyncio.__cached__)
"""
    done = inside(made, os.path.realpath(sys.executable), "-c", code)
    assert done.returncode == 0, done.stderr
    certificates, user, cached = done.stdout.split()
    assert int(certificates) > 100
    assert user == "slipway"
    # Compiled for where it lies in the image.
    assert str(made) not in cached


def test_it_holds_no_shell_no_installer_and_nothing_setuid(made: Path) -> None:
    paths = [path for path in made.rglob("*") if not path.is_symlink()]
    assert not UNWANTED & {path.name for path in paths if path.is_file()}
    assert not [path for path in paths if path.name in ("ensurepip", "pip", "site-packages", "test")]
    assert not [path for path in paths if path.is_file() and path.stat().st_mode & 0o6022]
    assert [path.relative_to(made).as_posix() for path in paths if path.stat().st_mode & 0o1002] == ["tmp", "var/tmp"]


def test_a_program_has_what_it_is_linked_to_and_no_more(tmp_path: Path) -> None:
    root.make(tmp_path / "image", ENVOY)
    done = inside(tmp_path / "image", str(ENVOY), "--version")
    assert done.returncode == 0, done.stderr
    assert "version" in done.stdout
    assert not list((tmp_path / "image").rglob("*.py"))


def test_a_library_that_the_root_lacks_is_told_by_name(made: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    library = next(path for path in root.linked(Path(sys.executable)) if path.name.startswith("libm."))
    (own / "extension.so").write_bytes(library.read_bytes())
    root.check(made, [own])
    there = made / os.path.realpath("/lib").lstrip("/")
    hidden = [path.rename(path.with_suffix(".away")) for path in there.rglob("libc.so.6")]
    try:
        with pytest.raises(SystemExit, match=r"error: the image lacks .*libc\.so\.6\. Fix: "):
            root.check(made, [own])
    finally:
        for path in hidden:
            path.rename(path.with_suffix(".6"))
