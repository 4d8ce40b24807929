"""Nodes come and go under torchrun: the ranks start again with those that are there, and the batch stays what it was.

Where a node of a gang is told to go, all end with the checkpoint written: whoever started them starts all again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from programs_of_trainer import TRAIN, program_environment

from tests.ports import free_port
from trainer.config import TrainConfig
from trainer.errors import StopSignal
from trainer.train import train

CONFIG = {**TRAIN, "steps": 120, "checkpoint": {"every_steps": 20}}


def node(endpoint: str, dataset: Path, directory: Path, *, nodes: str = "1:2") -> subprocess.Popen[str]:
    """The launcher of one node with one rank; it and its rank are a process group of their own."""
    flags = [f"--nnodes={nodes}", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=elastic"]
    flags += [f"--rdzv-endpoint={endpoint}", "--rdzv-conf=last_call_timeout=8,keep_alive_interval=1"]
    words = ["--config", str(directory / "train.yaml"), f"data={dataset}", f"run={directory / 'run'}"]
    command = [sys.executable, "-m", "trainer.launch", *flags, "--", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=program_environment(), start_new_session=True, **pipes)


def keeps_the_store(process: subprocess.Popen[str], endpoint: str) -> bool:
    """The first node to come keeps the store of the rendezvous: it is not the one to do without."""
    listening = (each.laddr for each in psutil.Process(process.pid).net_connections() if each.status == "LISTEN")
    return int(endpoint.split(":")[1]) in {address.port for address in listening}


def kill_node(process: subprocess.Popen[str]) -> None:
    """As when its machine loses power: launcher and rank (which has a session of its own) at once."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def rows(run: Path) -> list[dict]:
    log = run / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_rows(run: Path, count: int, nodes: list[subprocess.Popen[str]]) -> None:
    while len(rows(run)) < count:
        assert all(process.poll() is None for process in nodes), [process.communicate() for process in nodes]
        time.sleep(0.01)


def checkpoint(run: Path, *, step: int) -> Path:
    """What is written last of one."""
    return run / "checkpoints" / f"step-{step:08d}" / "manifest.json"


@pytest.mark.slow
def test_a_node_that_dies_is_done_without_and_the_losses_are_those_of_one_process(dataset, tmp_path):
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(CONFIG))
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = [node(endpoint, dataset, tmp_path) for _ in range(2)]
    wait_for_rows(tmp_path / "run", 1, nodes)
    first, second = sorted(nodes, key=lambda process: not keeps_the_store(process, endpoint))
    wait_for_rows(tmp_path / "run", 25, nodes)
    while not checkpoint(tmp_path / "run", step=20).exists():  # however slow the disk
        time.sleep(0.01)
    kill_node(second)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 0, said
    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    resumed = [event["step"] for event in events if event["event"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 20
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, CONFIG["steps"] + 1))
    ranks = [row["tokens_per_s"] / row["tokens_per_s_per_rank"] for row in (found[0], found[-1])]
    assert ranks == pytest.approx([2, 1], rel=0.05)

    torch.set_num_threads(1)
    train(TrainConfig.model_validate(CONFIG), data=dataset, run=tmp_path / "one", stop=StopSignal())
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(
        [row["loss"] for row in rows(tmp_path / "one")], rel=1e-3
    )


@pytest.mark.parametrize("told", ["the node that keeps the rendezvous", "the other node"])
def test_a_gang_of_which_one_node_is_told_to_go_ends_at_once_with_its_checkpoint(dataset, tmp_path, told):
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**CONFIG, "steps": 10_000}))
    endpoint, run = f"127.0.0.1:{free_port()}", tmp_path / "run"
    nodes = [node(endpoint, dataset, tmp_path, nodes="2") for _ in range(2)]
    wait_for_rows(run, 5, nodes)
    keeper, other = sorted(nodes, key=lambda process: not keeps_the_store(process, endpoint))
    (keeper if told == "the node that keeps the rendezvous" else other).terminate()
    said = [process.communicate(timeout=300)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [75, 75], said
    assert not any("Traceback" in words or "attempts left" in words for words in said), said
    last = rows(run)[-1]["step"]
    assert checkpoint(run, step=last).exists()
