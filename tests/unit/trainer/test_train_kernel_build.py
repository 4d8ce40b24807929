"""The trainer's C++ is compiled once for a processor, by whoever comes first, and where it cannot be, torch alone computes."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from programs_of_trainer import TRAIN

from trainer.config import TrainConfig
from trainer.errors import StopSignal
from trainer.kernels import build, decoder
from trainer.train import train


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A folder of the sources where nothing is compiled yet, and a cache that is empty."""
    folder = tmp_path / "kernels"
    shutil.copytree(build._HERE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "_HERE", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def compiler(path: Path, does: str) -> str:
    path.write_text(f"#!/bin/sh\necho called >> {path}.calls\n{does}\n")
    path.chmod(0o755)
    return str(path)


MAKES_ITS_LAST_ARGUMENT = 'sleep 0.2\nfor last; do :; done\necho library > "$last"'


def test_who_comes_while_another_compiles_waits_and_takes_its_library(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", MAKES_ITS_LAST_ARGUMENT))
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(build._compiled, ["x86-64-v3"] * 3))
    assert (tmp_path / "cxx.calls").read_text().count("called") == len(build._UNITS) + 1  # compiled and linked once
    (path,) = paths
    assert path.parent == sources / "__pycache__"
    assert path.read_text() == "library\n"
    assert build._compiled("x86-64-v4") != path


def test_a_folder_that_cannot_be_written_leaves_the_users_cache(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", MAKES_ITS_LAST_ARGUMENT))
    (sources / "__pycache__").write_text("in the way")
    assert build._compiled("x86-64-v3").parent == tmp_path / "cache" / "slipway" / "kernels"


def test_a_compiler_that_fails_is_told_with_its_words_and_leaves_nothing(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "echo no such instruction >&2; exit 1"))
    with pytest.raises(build.Unavailable, match="no such instruction"):
        build._compiled("x86-64-v3")
    assert not [path for path in (sources / "__pycache__").iterdir() if path.suffix != ".lock"]


def test_a_run_without_kernels_says_so_and_trains(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        decoder, "library", lambda: (_ for _ in ()).throw(build.Unavailable("there is no C++ compiler"))
    )
    decoder.why_not.cache_clear()
    try:
        train(TrainConfig.model_validate({**TRAIN, "steps": 2}), data=dataset, run=tmp_path / "run", stop=StopSignal())
    finally:
        decoder.why_not.cache_clear()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["message"] for each in events if each["event"] == "slow_kernels"] == [
        "torch alone computes: there is no C++ compiler"
    ]
    assert (tmp_path / "run" / "model" / "config.json").exists()
