"""What the training loop costs over a bare one, and what a second rank brings: tokens a second of the whole trainer.

`python tests/bench/bench_train.py [--seconds S] [--clock cpu]` writes build/bench/train.json. The trainer is the program that
`python -m trainer` runs, with its log, metrics, watchdog and data, on the shape of the local stack's default. The bare loop
has the same model, kernels, loss and optimizer and nothing else, not even clipping. Every rank has one thread and a process
of its own. They take turns of some steps, so that a busy machine is busy for all, and the middle of the turns' ratios
counts. `--clock cpu` takes processor time, of two ranks the first's: what it takes more than one rank's half is overhead.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from trainer.config import TrainConfig  # noqa: E402
from trainer.data import Cursor, DataConfig, Dataset, make_dataset  # noqa: E402
from trainer.errors import StopSignal  # noqa: E402
from trainer.log import Log  # noqa: E402
from trainer.model import Decoder  # noqa: E402
from trainer.optim import make_optimizer  # noqa: E402
from trainer.step import make_deterministic  # noqa: E402
from trainer.train import train  # noqa: E402

OUT = ROOT / "build" / "bench"
TURN_STEPS = 12
CONFIG = TrainConfig.model_validate(
    {
        "model": {"layers": 4, "hidden": 96, "heads": 3, "kv_heads": 3, "ffn": 256, "max_context": 256},
        "seq": 256,
        "global_batch": 4,
        "micro_batch": 2,
        "steps": 1_000_000,
        "optim": {"lr": 6e-3},
    }
)
DATA = {"source": {"kind": "text", "path": str(ROOT / "infra"), "glob": "**/*.py"}, "vocab_size": 2048, "held_out": 0.1}


class Turns:
    """Called before each step: every few of them it tells how long they took and waits for the next turn."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._steps = connection, 0
        self._begun = 0.0, 0.0

    def __call__(self, *_step: object) -> None:
        if self._steps % TURN_STEPS == 0:
            if self._steps:
                wall_s, cpu_s = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
                self._connection.send({"wall": wall_s, "cpu": cpu_s})
            self._connection.recv()
            self._begun = time.perf_counter(), time.process_time()
        self._steps += 1


def bare(data: Path, turns: Turns) -> None:
    """Model, loss, optimizer step. The batches are drawn beforehand."""
    make_deterministic(0)
    dataset = Dataset.open(data)
    cursor = Cursor.of(dataset, seq=CONFIG.seq, global_batch=CONFIG.global_batch, seed=0)
    model = Decoder(CONFIG.model, vocab_size=dataset.vocab_size)
    optimizer = make_optimizer(model, CONFIG.optim)
    where, device = {"micro_batch": CONFIG.micro_batch, "rank": 0, "world": 1}, torch.device("cpu")
    drawn = [
        [cursor.batch(n, micro=micro, **where).tensors(device) for micro in range(CONFIG.grad_accum(1))]
        for n in range(TURN_STEPS)
    ]
    while True:
        for batches in drawn:
            turns()
            for tokens, targets, _ in batches:
                model(tokens, targets).backward()
            optimizer.step()
            optimizer.zero_grad()


def work(connection: Connection | None, data: Path, run: Path | None, environment: dict[str, str]) -> None:
    """A process: the trainer with a run of its own, or the bare loop. A rank without a connection follows the others."""
    os.environ |= environment
    torch.set_num_threads(1)
    turns = None if connection is None else Turns(connection)
    if run is None:
        assert turns is not None
        bare(data, turns)
    else:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # what the log says is nobody's
            train(CONFIG, data=data, run=run, stop=StopSignal(), on_step=turns)


@contextmanager
def peer(data: Path, run: Path | None, *, world: int = 1) -> Iterator[Any]:
    """The processes of one trainer, which end with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    ranks = [
        context.Process(target=work, args=(None if rank else theirs, data, run, {**meeting, "RANK": str(rank)}))
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            rank.start()
        yield ours
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def row(name: str, mine: list[float], theirs: list[float], *, goal: float, unit: str) -> dict[str, object]:
    tokens = TURN_STEPS * CONFIG.global_batch * CONFIG.seq
    ratio = statistics.median(their / my for my, their in zip(mine, theirs, strict=True))
    rates = {"ours": tokens / statistics.median(mine), "peer": tokens / statistics.median(theirs)}
    numbers = {who: round(rate) for who, rate in rates.items()}
    return {"name": name, **numbers, "ratio": round(ratio, 3), "goal": goal, "unit": unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT) as directory:
        data, alone, together = (Path(directory) / name for name in ("data", "alone", "together"))
        make_dataset(DataConfig.model_validate(DATA), data, log=Log(rank=1))
        with peer(data, alone) as one, peer(data, None) as loop, peer(data, together, world=2) as two:
            peers = {"one": one, "bare": loop, "two": two}
            seconds = take_turns(peers, seconds=options.seconds, clock=options.clock)
    unit = "tokens/s" if options.clock == "wall" else "tokens a CPU second of rank 0"
    rows = [
        row("the trainer beside a bare loop", seconds["one"], seconds["bare"], goal=0.97, unit=unit),
        row("two ranks beside one", seconds["two"], seconds["one"], goal=1.6, unit=unit),
    ]
    (OUT / "train.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


def take_turns(peers: dict[str, Any], *, seconds: float, clock: str) -> dict[str, list[float]]:
    """What each turn took each of them; the first, which warms up, is left out."""
    found: dict[str, list[float]] = {name: [] for name in peers}
    end, number = time.monotonic() + seconds, 0
    while number < 3 or time.monotonic() < end:
        for name in list(peers)[:: 1 if number % 2 else -1]:
            peers[name].send("go")
            found[name].append(peers[name].recv()[clock])
        number += 1
    return {name: turns[1:] for name, turns in found.items()}


if __name__ == "__main__":
    main()
