"""`local_sgd.launches` from a stack file: two gangs that train apart as Jobs of their own, of which one is killed and returns."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.local import Status, status

ROOT = Path(__file__).parents[3]
STEPS = 60


def project(folder: Path) -> Path:
    """A project with one stack, `apart`: a model of a few thousand parameters, two launches of one rank."""
    (folder / "stacks").mkdir(parents=True)
    (folder / "Pulumi.yaml").write_text((ROOT / "Pulumi.yaml").read_text())
    (folder / "texts").mkdir()
    for number in range(8):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} one two three four five six seven\n" * 60)
    training = {
        "name": "pairs",
        "pool": "laptop",
        "nodes": 2,
        "nproc_per_node": 1,
        "resources": {"cpus": 1, "memory_gib": 2},
        "data": {
            "source": {"kind": "text", "path": str(folder / "texts")},
            "vocab_size": 260,
            "held_out": 0.25,
        },
        "model": {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "ffn": 32, "max_context": 32},
        **{"seq": 32, "global_batch": 4, "micro_batch": 2, "steps": STEPS, "log_every_steps": 1},
        "optim": {"lr": 1e-3, "min_lr": 0, "warmup_steps": 5},
        "checkpoint": {"every_steps": 5},
        # The other waits for one that died until it is back, or for this long.
        "local_sgd": {"every_steps": 5, "launches": 2, "lost_after_s": 120},
        "evaluate": {"max_tokens": 500, "baselines": []},
        "gate": {"must_beat": None},
    }
    config = {
        "slipway:platform": {"cloud": "local"},
        "slipway:node_pools": [{"name": "laptop", "instance": "cpu", "max_nodes": 2}],
        "slipway:training": training,
    }
    (folder / "stacks" / "Pulumi.apart.yaml").write_text(yaml.safe_dump({"config": config}))
    return folder


def slipway(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "infra.cli.main", *arguments, "-s", "apart"],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks(found: Status, launch: int) -> list[int]:
    """Processes of a launch's training container."""
    return [pid for w in found.workloads if w.name.endswith(f"-{launch}") for pod in w.pods for pid in pod.pids]


def events(state: Path, launch: int) -> list[dict[str, Any]]:
    logs = list((state / "logs").glob(f"train-pairs-*-{launch}-0/train.log"))
    lines = [line for path in logs for line in path.read_text().splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def steps(state: Path, launch: int) -> list[int]:
    return [event["step"] for event in events(state, launch) if event.get("stage") == "train" and "step" in event]


@pytest.mark.slow
def test_a_launch_dies_and_returns_and_the_other_is_not_started_again(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    folder = project(tmp_path / "project")
    state = folder / ".slipway" / "apart"
    up = slipway("local", "up", cwd=folder)
    try:
        eventually(lambda: steps(state, 1) or up.poll() is not None, within_s=240)
        assert up.poll() is None, up.communicate()[1]
        for pid in ranks(status(state), 1):
            os.killpg(pid, signal.SIGKILL)
        assert up.wait(300) == 0, up.communicate()[1]

        found = {w.name.rsplit("-", 2)[-1]: w for w in status(state).workloads if w.name.startswith("train-")}
        assert {launch: (w.state, w.restarts) for launch, w in found.items()} == {
            "0": ("Complete", 0),
            "1": ("Complete", 1),
        }
        assert [event["replica"] for event in events(state, 1) if event["event"] == "joined"] == [0]
        assert steps(state, 0)[-1] == steps(state, 1)[-1] == STEPS
        runs = sorted((state / "volumes" / "runs").iterdir(), key=lambda run: len(run.name))
        one, other = ((run / "model" / "model.safetensors").read_bytes() for run in runs)
        assert one == other
        assert list((state / "volumes" / "registry" / "models" / "pairs" / "channels").iterdir())
    finally:
        up.kill()
        down = slipway("local", "down", "--volumes", cwd=folder)
        assert down.wait(120) == 0, down.communicate()[1]
    assert not state.exists()
