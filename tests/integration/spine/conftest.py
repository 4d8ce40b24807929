"""A project of its own, with a stack that is small enough to train in seconds, run by the real command line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.ports import free_port

ROOT = Path(__file__).parents[3]
LONGEST_S = 240

TINY: dict[str, Any] = {
    "slipway:platform": {"cloud": "local"},
    "slipway:node_pools": [{"name": "laptop", "instance": "cpu"}],
    "slipway:training": {
        "name": "tiny",
        "pool": "laptop",
        "nproc_per_node": 2,
        "resources": {"cpus": 2, "memory_gib": 4},
        "data": {"source": {"kind": "text", "path": "CORPUS", "glob": "*.txt"}, "vocab_size": 320, "held_out": 0.2},
        "model": {"layers": 1, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "max_context": 64},
        "seq": 64,
        "global_batch": 8,
        "micro_batch": 4,
        "steps": 120,
        "optim": {"lr": 0.01, "min_lr": 0.001, "warmup_steps": 10},
        "checkpoint": {"every_steps": 20, "keep": 2},
        "log_every_steps": 5,
        "evaluate": {"max_tokens": 4000, "sample": {"prompt": "the ", "max_tokens": 8}},
        "gate": {"must_beat": "unigram"},
    },
    "slipway:services": [
        {
            "name": "chat",
            "model": "tiny",
            "pool": "laptop",
            "replicas": 2,
            "resources": {"cpus": 1, "memory_gib": 2},
            "kv_gib": 0.05,
            "drain_s": 20,
        }
    ],
    "slipway:router": {"port": 0, "replicas": 1},
}


@dataclass
class Project:
    folder: Path
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def state(self) -> Path:
        return self.folder / ".slipway" / "tiny"

    def write(self, **changes: Any) -> None:
        """Write the stack file; `training__steps=5` changes a value of it."""
        config = json.loads(json.dumps(TINY))
        config["slipway:router"]["port"] = self.port
        config["slipway:training"]["data"]["source"]["path"] = str(self.folder / "corpus")
        for path, value in changes.items():
            first, *rest = path.split("__")
            node, keys = config, [f"slipway:{first}", *rest]
            for key in keys[:-1]:
                node = node[int(key)] if isinstance(node, list) else node[key]
            node[keys[-1]] = value
        (self.folder / "stacks" / "Pulumi.tiny.yaml").write_text(yaml.safe_dump({"config": config}))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "infra.cli.main", *arguments, "-s", "tiny"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def slipway(self, *arguments: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        stdout, stderr = process.communicate(timeout=LONGEST_S)
        assert process.returncode == exit_code, f"{arguments}: exit {process.returncode}\n{stdout}\n{stderr}"
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def processes(self) -> list[psutil.Process]:
        """Every process that this project started, by its mark."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLIPWAY_LOCAL") == str(self.state.resolve()) and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """Training ranks that run now."""
        return [p for p in self.processes() if "RANK" in p.environ() and "LOCAL_RANK" in p.environ()]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log events of the programs called `name` (a prefix of the workload's), oldest first."""
        lines: list[dict[str, Any]] = []
        for file in sorted((self.state / "logs").glob(f"{name}*/*.log")):
            for line in file.read_text().splitlines():
                if line.startswith("{"):
                    lines.append(json.loads(line))
        return lines

    def workloads(self) -> dict[str, dict[str, Any]]:
        document = json.loads(self.slipway("local", "status", "--json").stdout)
        return {workload["name"]: workload for workload in document["workloads"]}


def make_project(folder: Path) -> Project:
    shutil.copytree(ROOT / "stacks", folder / "stacks", ignore=shutil.ignore_patterns("Pulumi.*", "__pycache__"))
    shutil.copy(ROOT / "Pulumi.yaml", folder)
    (folder / "corpus").mkdir()
    sentence = "the quick brown fox jumps over a lazy dog and runs home to sleep near warm fire while rain falls"
    words = sentence.split()
    for n in range(30):
        text = " ".join(words[(i * i + n * 3 + i // 5) % len(words)] for i in range(600))
        (folder / "corpus" / f"{n}.txt").write_text(text)
    project = Project(folder, free_port())
    project.write()
    return project


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = make_project(tmp_path)
    yield made
    made.slipway("local", "down")
    assert made.processes() == []


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project that is up."""
    made = make_project(tmp_path_factory.mktemp("served"))
    made.slipway("local", "up")
    yield made
    made.slipway("local", "down")
    assert made.processes() == []
