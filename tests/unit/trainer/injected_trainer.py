"""The trainer with faults at given steps: one rank of torchrun, `injected_trainer.py EVENTS MARKS <the trainer's words>`.

EVENTS is a JSON list of `{"step", "rank", "do"}`; each happens once, however often the run is started again.
"""

import json
import os
import resource
import signal
import socket
import time
from pathlib import Path

from trainer.command import read_command
from trainer.config import TrainConfig
from trainer.errors import StopSignal, run_program
from trainer.parallel import Ranks
from trainer.train import train


class EventInjector:
    """Does what the events say when the training is about to make the step after theirs."""

    def __init__(self, events: list[dict], *, marks: Path, run: Path) -> None:
        self._events, self._marks, self._run = events, marks, run

    def __call__(self, done: int, ranks: Ranks) -> None:
        for number, event in enumerate(self._events):
            mark = self._marks / str(number)
            if event["step"] == done and event["rank"] == ranks.rank and not mark.exists():
                time.sleep(1.0)  # the checkpoint before it is on the disk by then
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
        for name in os.listdir("/proc/self/fd"):
            try:
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


def main(arguments: list[str]) -> None:
    stop = StopSignal()
    stop.listen()
    events, marks, *words = arguments
    config, places = read_command("trainer", TrainConfig, places=("data", "run"), arguments=words)
    run = Path(places["run"])
    injector = EventInjector(json.loads(events), marks=Path(marks), run=run)
    train(config, data=Path(places["data"]), run=run, stop=stop, on_step=injector)


run_program(main)
