"""`python -m trainer.wait` and the trainer's `/metrics`, as processes and over HTTP."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from programs_of_trainer import REPOSITORY

from trainer.errors import Refused
from trainer.metrics import TrainMetrics

CONTRACT = (REPOSITORY / "docs" / "contracts.md").read_text()


def wait(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer.wait", *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_it_ends_once_all_paths_are_there(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.touch()
    waiting = wait(str(first), str(second))
    time.sleep(1)
    assert waiting.poll() is None
    second.touch()
    waiting.communicate(timeout=30)
    assert waiting.returncode == 0


def test_a_timeout_names_what_is_missing(tmp_path: Path) -> None:
    waiting = wait(str(tmp_path / "never"), "--timeout", "0.3")
    stderr = waiting.communicate(timeout=30)[1]
    assert waiting.returncode == 1
    assert "never" in stderr
    assert "Traceback" not in stderr


def test_bad_arguments_are_refused() -> None:
    waiting = wait("--timeout", "soon", "x")
    assert "soon" in waiting.communicate(timeout=30)[1]
    assert waiting.returncode == 2


def test_it_costs_no_torch() -> None:
    check = "import sys, trainer.wait; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY).returncode == 0


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as picked:
        picked.bind(("127.0.0.1", 0))
        number = picked.getsockname()[1]
    monkeypatch.setenv("METRICS_PORT", str(number))
    monkeypatch.setenv("METRICS_HOST", "127.0.0.1")
    return number


def test_metrics_have_the_contract_s_names_and_the_last_values(port: int) -> None:
    metrics = TrainMetrics()
    metrics.serve()
    ratios = ("data_wait", "goodput", "mfu", "hfu", "step_to_planned", "memory_to_planned")
    costs = {"step_s": 0.1, "tokens_per_s_per_rank": 500.0, "memory_peak_bytes": 1, "memory_reserved_peak_bytes": 2}
    row = {"step": 7, "loss": 2.5, "lr": 0.1, "tokens_per_s": 1000.0, "grad_norm": 1.5, "at": 1.0}
    metrics.show({**row, **costs, **{f"{name}_ratio": 0.5 for name in ratios}})
    metrics.tokens.inc(64)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    section = CONTRACT.split("## Metrics")[1].split("Serving:")[0]
    for name in re.findall(r"`(slipway_train_\w+)`", section):
        assert f"\n{name} " in text, name
    assert "slipway_train_loss 2.5" in text
    assert "slipway_train_tokens_total 64.0" in text


def test_a_taken_port_is_refused(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(Refused, match="cannot serve metrics"):
            TrainMetrics().serve()
