"""`python -m trainer --config train.yaml data=DIR run=DIR [base=DIR] [checkpoints=URL]`, alone or as one rank of torchrun."""

import ctypes
import os
import signal
import sys
from pathlib import Path

from trainer.command import read_train_command
from trainer.errors import StopSignal, run_program

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    stop = StopSignal()
    stop.listen()  # before torch takes its seconds to load: a signal in them is not lost
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # Ranks have sessions of their own: were the launcher killed outright, they would run on with nobody to stop them.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    config, places = read_train_command(arguments)
    from trainer.train import train

    base = Path(places["base"]) if "base" in places else None
    checkpoints = places.get("checkpoints")
    train(config, data=Path(places["data"]), run=Path(places["run"]), base=base, checkpoints=checkpoints, stop=stop)


run_program(main)
