"""The trainer with faults at given steps, under torchrun.

An event is `{"step", "rank", "do", "after"}`; each happens once, however often the run is started again, and when the checkpoint
of step `after` is on the disk.
"""

import os
import resource
import signal
import socket
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from replicas_of_trainer import fork
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from trainer.config import TrainConfig
from trainer.errors import StopSignal
from trainer.parallel import Ranks
from trainer.train import train


class EventInjector:
    """Does what the events say when the training is about to make the step after theirs."""

    def __init__(self, events: list[dict], *, marks: Path, run: Path) -> None:
        self._events, self._marks, self._run = events, marks, run
        self._of_the_agent = set(os.listdir("/proc/self/fd"))  # a fork has its connections too

    def __call__(self, done: int, ranks: Ranks) -> None:
        for number, event in enumerate(self._events):
            mark = self._marks / str(number)
            if event["step"] == done and event["rank"] == ranks.rank and not mark.exists():
                while not (self._run / "checkpoints" / f"step-{event['after']:08d}").exists():
                    time.sleep(0.01)
                mark.touch()
                getattr(self, event["do"])()

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self) -> None:
        time.sleep(10_000)

    def corrupt(self) -> None:
        newest = max((self._run / "checkpoints").glob("step-*"))
        part = next(newest.glob("*.distcp"))
        part.write_bytes(part.read_bytes()[:-9] + b"corrupted")
        self.kill()

    def fill_disk(self) -> None:
        """No file of this process grows beyond a few bytes from now on."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    def cut_network(self) -> None:
        for name in set(os.listdir("/proc/self/fd")) - self._of_the_agent:
            try:
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


def injected_rank(config: TrainConfig, data: Path, run: Path, marks: Path, events: list[dict]) -> None:
    """One rank, as torchrun starts it."""
    torch.set_num_threads(1)
    train(config, data=data, run=run, stop=StopSignal(), on_step=EventInjector(events, marks=marks, run=run))


def launch_two(said: Path, *arguments: Any) -> int:
    """The exit code of torchrun's own agent with two such ranks, which it starts again when one ends badly.

    Its ranks are forked: each start would else import for seconds what is here already.
    """
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": uuid4().hex}
    config = LaunchConfig(1, 1, 2, max_restarts=7, start_method="fork", **rendezvous)
    pid = fork(lambda: elastic_launch(config, injected_rank)(*arguments), said=said)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
