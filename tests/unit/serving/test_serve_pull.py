"""Copying a model for a runtime that does not know the registry: waited for, verified, and found at one place."""

import threading
import time
from pathlib import Path

import pytest
from tiny_packages import point, publish

from serving import pull

FILES = {"config.json": "{}", "weights.bin": "0123456789" * 100, "tokenizer.json": "{}"}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "registry"


def package(root: Path, **changes: str) -> Path:
    for name, text in (FILES | changes).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_it_waits_for_the_channel_and_points_at_a_whole_copy(registry: Path, tmp_path: Path) -> None:
    digest = publish(package(tmp_path / "one"), registry)
    channel = registry / "models" / "tiny" / "channels" / "production.json"
    codes: list[int] = []
    words = [f"file://{channel}", str(tmp_path / "models" / "package")]
    waiting = threading.Thread(target=lambda: codes.append(pull.main(words)))
    waiting.start()
    time.sleep(0.1)
    assert not (tmp_path / "models").exists()
    point(registry, digest)
    waiting.join(timeout=30)
    assert codes == [0]
    link = tmp_path / "models" / "package"
    assert {name: (link / name).read_text() for name in FILES} == FILES
    assert link.resolve().name == digest


def test_the_next_start_takes_the_next_model(registry: Path, tmp_path: Path) -> None:
    link = tmp_path / "models" / "package"
    for text in ("first", "second"):
        channel = point(registry, publish(package(tmp_path / text, **{"config.json": text}), registry))
        assert pull.main([f"file://{channel}", str(link)]) == 0
        assert (link / "config.json").read_text() == text


def test_a_damaged_package_is_refused_and_leaves_no_link(
    registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = publish(package(tmp_path / "one"), registry)
    channel = point(registry, digest)
    (registry / "models" / "tiny" / digest / "weights.bin").write_text("changed")
    assert pull.main([f"file://{channel}", str(tmp_path / "package")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: sha256 is ")
    assert "weights.bin" in said
    assert not (tmp_path / "package").is_symlink()
