"""Nodes come and go under torchrun: the ranks start again with those that are there, and the batch stays what it was.

Where a node of a gang is told to go, all end with the checkpoint written: whoever started them starts all again.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from programs_of_trainer import TRAIN
from replicas_of_trainer import fork
from torch.distributed.launcher.api import LaunchConfig

from tests.ports import free_port
from trainer.config import TrainConfig
from trainer.errors import StopSignal, run_program
from trainer.launch import run_node
from trainer.train import train

CONFIG = {**TRAIN, "steps": 120, "checkpoint": {"every_steps": 20}}
ENDS_WITHIN_S = 120


def a_rank(config: TrainConfig, data: Path, run: Path) -> None:
    """As `python -m trainer` does it, with its exit code."""
    torch.set_num_threads(1)
    stop = StopSignal()
    stop.listen()
    try:
        run_program(lambda _: train(config, data=data, run=run, stop=stop))
    except SystemExit as end:
        if end.code:
            raise


class Node:
    """The launcher of one node with one rank. Forked, like its rank: each would else import for seconds what is here."""

    def __init__(self, number: int, endpoint: str, dataset: Path, directory: Path, *, nodes: tuple[int, int], **more):
        self._port, self.said = int(endpoint.split(":")[1]), directory / f"said-{number}"
        timing = {"last_call_timeout": 8, "keep_alive_interval": 1}
        rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": endpoint, "run_id": "elastic", "rdzv_configs": timing}
        launch = LaunchConfig(*nodes, 1, max_restarts=3, start_method="fork", **rendezvous)
        place = (TrainConfig.model_validate({**CONFIG, **more}), dataset, directory / "run")
        pid = fork(lambda: run_program(lambda _: run_node(launch, a_rank, *place)), said=self.said)
        self.process = psutil.Process(pid)

    @property
    def keeps_the_store(self) -> bool:
        """The first node to come keeps the store of the rendezvous."""
        listening = (each.laddr for each in self.process.net_connections() if each.status == "LISTEN")
        return self._port in {address.port for address in listening}

    def kill(self) -> None:
        """As when its machine loses power: launcher and rank at once."""
        for process in (self.process, *self.process.children(recursive=True)):
            process.kill()
        self.ended()

    def ended(self) -> int:
        """Its exit code, when it has ended; it is killed where it does not."""
        end_s = time.monotonic() + ENDS_WITHIN_S
        while time.monotonic() < end_s:
            pid, status = os.waitpid(self.process.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"still there after {ENDS_WITHIN_S} s: {self.said.read_text()}")


@pytest.fixture
def gang(dataset, tmp_path, monkeypatch):
    """Starts two nodes, and returns them when they have made a step: the one that keeps the rendezvous, and the other."""
    monkeypatch.setattr(sys, "argv", ["trainer"])
    started: list[Node] = []

    def start(nodes: tuple[int, int], **more) -> tuple[Node, Node]:
        endpoint = f"127.0.0.1:{free_port()}"
        started.extend(Node(number, endpoint, dataset, tmp_path, nodes=nodes, **more) for number in range(2))
        wait_for_rows(tmp_path / "run", 1)
        keeper, other = sorted(started, key=lambda node: not node.keeps_the_store)
        return keeper, other

    yield start
    for node in started:
        if node.process.is_running():
            node.kill()


def rows(run: Path) -> list[dict]:
    log = run / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_rows(run: Path, count: int) -> None:
    end_s = time.monotonic() + ENDS_WITHIN_S
    while len(rows(run)) < count:
        assert time.monotonic() < end_s, [said.read_text() for said in run.parent.glob("said-*")]
        time.sleep(0.01)


def checkpoint(run: Path, *, step: int) -> Path:
    """What is written last of one."""
    return run / "checkpoints" / f"step-{step:08d}" / "manifest.json"


def test_a_node_that_dies_is_done_without_and_the_losses_are_those_of_one_process(gang, dataset, tmp_path):
    run = tmp_path / "run"
    keeper, other = gang((1, 2))
    wait_for_rows(run, 25)
    while not checkpoint(run, step=20).exists():  # however slow the disk
        time.sleep(0.01)
    other.kill()
    assert keeper.ended() == 0, keeper.said.read_text()
    events = [json.loads(line) for line in keeper.said.read_text().splitlines() if line.startswith("{")]
    resumed = [event["step"] for event in events if event["event"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 20
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, CONFIG["steps"] + 1))
    ranks = [row["tokens_per_s"] / row["tokens_per_s_per_rank"] for row in (found[0], found[-1])]
    assert ranks == pytest.approx([2, 1], rel=0.05)

    torch.set_num_threads(1)
    train(TrainConfig.model_validate(CONFIG), data=dataset, run=tmp_path / "one", stop=StopSignal())
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in rows(tmp_path / "one")], rel=1e-3)


@pytest.mark.parametrize("told", ["the node that keeps the rendezvous", "the other node"])
def test_a_gang_of_which_one_node_is_told_to_go_ends_at_once_with_its_checkpoint(gang, tmp_path, told):
    nodes = keeper, other = gang((2, 2), steps=10_000)
    (keeper if told == "the node that keeps the rendezvous" else other).process.send_signal(signal.SIGTERM)
    codes = [node.ended() for node in nodes]
    said = [node.said.read_text() for node in nodes]
    assert codes == [75, 75], said
    assert not any("\nTraceback" in words or "attempts left" in words for words in said), said
    last = rows(tmp_path / "run")[-1]["step"]
    assert checkpoint(tmp_path / "run", step=last).exists()


def test_a_gang_whose_rendezvous_is_lost_says_so_in_one_line_and_fails(gang):
    keeper, other = gang((2, 2), steps=10_000)
    keeper.kill()
    assert other.ended() == 1, other.said.read_text()
    errors = [line for line in other.said.read_text().splitlines() if line.startswith("error: ")]
    assert len([line for line in errors if "the other launchers were lost" in line]) == 1
    assert errors[-1].endswith("the next start goes on from the newest checkpoint.")
