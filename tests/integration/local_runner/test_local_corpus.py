"""A corpus in a directory of this machine, from the stack file to a published classifier: `slipway local up`, real processes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
WORDS = {"pos": ("good", "great", "fine", "nice"), "neg": ("bad", "poor", "awful", "sad")}


def project(folder: Path) -> Path:
    """A project with one stack, `moods`, which learns to tell good words from bad ones."""
    (folder / "stacks").mkdir(parents=True)
    (folder / "Pulumi.yaml").write_text((ROOT / "Pulumi.yaml").read_text())
    draw = random.Random(1)
    rows = [(label, " ".join(draw.choices(WORDS[label], k=6))) for label in draw.choices(sorted(WORDS), k=300)]
    (folder / "rows").mkdir()
    (folder / "rows" / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for c, t in rows))
    training = {
        "name": "moods",
        "pool": "laptop",
        "nproc_per_node": 1,
        "resources": {"cpus": 1, "memory_gib": 3},
        "data": {
            "source": {"kind": "jsonl", "path": str(folder / "rows")},
            "task": {"kind": "classify", "labels": sorted(WORDS)},
            "vocab_size": 300,
            "held_out": 0.2,
        },
        "model": {
            "layers": 1,
            "hidden": 32,
            "heads": 2,
            "kv_heads": 1,
            "ffn": 64,
            "max_context": 32,
            "family": "qwen3",
        },
        **{"seq": 32, "global_batch": 8, "micro_batch": 8, "steps": 40},
        "optim": {"lr": 3e-3, "min_lr": 0, "warmup_steps": 5},
        "gate": {"must_beat": None, "min_accuracy": {"classification": 0.9}},
    }
    config = {
        "slipway:platform": {"cloud": "local"},
        "slipway:node_pools": [{"name": "laptop", "instance": "cpu", "max_nodes": 1}],
        "slipway:training": training,
    }
    (folder / "stacks" / "Pulumi.moods.yaml").write_text(yaml.safe_dump({"config": config}))
    return folder


def slipway(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infra.cli.main", *arguments, "-s", "moods"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_rows_of_a_directory_become_a_published_classifier(tmp_path: Path) -> None:
    folder = project(tmp_path / "project")
    refused = slipway("render", "-o", str(tmp_path / "out"), cwd=folder)
    assert refused.returncode == 2
    assert "volume_claim" in refused.stderr  # a cluster does not have the directory
    try:
        done = slipway("local", "up", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "texts to classify" in done.stderr
        status = json.loads(slipway("status", "--json", cwd=folder).stdout)
        assert {workload["state"] for workload in status["workloads"]} == {"Complete"}
        lines = slipway("logs", "train", cwd=folder).stdout
        assert '"stage": "train"' in lines
    finally:
        slipway("local", "down", "--volumes", cwd=folder)
    assert not (folder / ".slipway" / "moods").exists()
