"""Replicas that are launches of their own, as processes of two ranks each that can be killed and started again.

Forked from the test, they share the seconds that imports take. Each rank is what torchrun would have started.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import trainer.plot  # noqa: F401  # once here, and not in every fork that ends
from tests.ports import free_port
from trainer.config import TrainConfig
from trainer.errors import StopSignal, run_program
from trainer.train import train


def fork(act: Callable[[], None], *, said: Path) -> int:
    """The pid of a process that does `act` and exits with 0, as `act` says, or with 1 when it raised; what it says goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = said.open("a")
        act()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def two_ranks(config: TrainConfig, *, said: Path, **where: Any) -> list[int]:
    """The exit codes of both, each as a program would have ended; `where` is what `train` is told beside."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}

    def rank(number: int) -> None:
        torch.set_num_threads(1)
        sys.argv = ["trainer"]
        os.environ.update(place, RANK=str(number), LOCAL_RANK=str(number))
        run_program(lambda _: train(config, stop=StopSignal(), **where))

    pids = [fork(lambda number=number: rank(number), said=said) for number in range(2)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


class Replica:
    """One launch: `start` it, `kill` it, `start` it again; `run` is its directory."""

    def __init__(self, number: int, config: TrainConfig, *, data: Path, directory: Path, meeting: str, pause_s: float):
        self.run = directory / f"run-{number}"
        self.said = directory / f"said-{number}"
        self._number, self._config, self._data, self._meeting, self._pause_s = number, config, data, meeting, pause_s
        self.pids: list[int] = []

    def start(self) -> None:
        port = free_port()
        self.pids = [fork(lambda rank=rank: self._rank(rank, port), said=self.said) for rank in (0, 1)]

    def _rank(self, rank: int, port: int) -> None:
        torch.set_num_threads(1)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}
        place |= {"REPLICA": self._number, "MEETING_ENDPOINT": self._meeting}
        os.environ.update({name: str(value) for name, value in place.items()})
        train(
            self._config,
            data=self._data,
            run=self.run,
            stop=StopSignal(),
            on_step=lambda _step, _ranks: time.sleep(self._pause_s),
        )

    def signal(self, number: signal.Signals) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> list[int]:
        """The exit codes of the ranks."""
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        self.pids = []
        return codes

    def wait_for(self, rows: int) -> None:
        """Returns when its log has so many."""
        log, end_s = self.run / "log.jsonl", time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < rows:
            assert time.monotonic() < end_s, self.said.read_text()
            time.sleep(0.02)
