"""Many layouts in one group of processes: starting processes takes longer than all of their steps.

`run_layouts` trains a few steps in each layout on as many gloo ranks and returns the losses and norms that rank 0 saw.
`test` of a layout says which checkpoint to begin from and when to save one, and whether most targets do not count:
`{"load": NAME, "save_at": STEP, "optimizer": "sgd", "padded": True}`.
"""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from prometheus_client import CollectorRegistry

from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, TrainConfig
from trainer.data import Batch, Cursor, TokenStream
from trainer.data.windows import StreamWindows
from trainer.errors import StopSignal
from trainer.layout import layout_of
from trainer.local_sgd import LocalSgd
from trainer.log import Log
from trainer.loss import IGNORED
from trainer.optim import learning_rate, make_optimizer
from trainer.parallel import Laid, Ranks, lay_out
from trainer.parallel.ranks import place
from trainer.progress import Progress
from trainer.step import make_deterministic, train_step
from trainer.storage import Storage
from trainer.traffic import Traffic

VOCAB, STEPS = 64, 5
BASE: dict[str, Any] = {
    "model": {
        "layers": 4,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "ffn": 64,
        "max_context": 64,
        "tied_embeddings": False,
    },
    "seq": 32,
    "global_batch": 16,
    "micro_batch": 2,
    "steps": STEPS,
    "optim": {"lr": 2e-2},
    "dtype": "float32",
}


def config_of(more: dict[str, Any]) -> TrainConfig:
    model = {**BASE["model"], **more.get("model", {})}
    return TrainConfig.model_validate({**BASE, **more, "model": model})


def cursor_of(directory: Path, config: TrainConfig) -> Cursor:
    """Over text that can be learnt: every token follows from the one before, most of the time."""
    path = directory / "train-00000.bin"
    if not path.exists():
        draws = np.random.default_rng(0)
        follows = draws.permutation(VOCAB)
        tokens = [0]
        for surprise in draws.random(20_000):
            tokens.append(int(follows[tokens[-1]]) if surprise > 0.2 else int(draws.integers(VOCAB)))
        np.array(tokens).astype("<u2").tofile(path)
    stream = TokenStream([path], dtype=np.dtype("<u2"))
    windows = StreamWindows(stream, seq=config.seq, end_of_text=0 if config.document_mask else None)
    return Cursor([(windows, 1.0)], global_batch=config.global_batch, seed=3)


class Padded:
    """Samples of which the targets count up to a place of each one's own, and of every third sample none does."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor

    def batch(self, step: int, *, micro: int, micro_batch: int, rank: int, world: int) -> Batch:
        batch = self._cursor.batch(step, micro=micro, micro_batch=micro_batch, rank=rank, world=world)
        sums = batch.tokens_BL.sum(1)
        counts = np.where(sums % 3 == 0, 0, sums % (batch.tokens_BL.shape[1] - 1))
        late = np.arange(batch.targets_BL.shape[1]) >= counts[:, None]
        return replace(batch, targets_BL=np.where(late, IGNORED, batch.targets_BL))


def curve(config: TrainConfig, ranks: Ranks, directory: Path, *, name: str, test: dict[str, Any]) -> dict[str, Any]:
    """(loss, norm of the gradients) of each step, from the checkpoint that `test` names, and the digest of the weights."""
    laid = lay_out(config, vocab_size=VOCAB, ranks=ranks, low_precision=config.dtype == "bfloat16")
    optimizer = make_optimizer(laid.module, config.optim)
    if test.get("optimizer") == "sgd":
        optimizer = torch.optim.SGD(laid.module.parameters(), lr=config.optim.lr)
    traffic = Traffic(every_steps=test.get("traffic"), registry=CollectorRegistry(), log=Log(rank=1))
    outer = LocalSgd.of(config.local_sgd, laid.parts, ranks)
    cursor, stop, found, progress = cursor_of(directory, config), StopSignal(), [], Progress()
    batches = Padded(cursor) if test.get("padded") else cursor
    saved, log = CheckpointConfig(), Log(rank=1)
    if "load" in test:
        checkpoints = Checkpoints(
            Storage(str(directory / test["load"])), config=saved, identity="it", ranks=ranks, log=log
        )
        loaded = checkpoints.load_newest(laid.parts, optimizer, **(outer.state() if outer else {}))
        assert loaded is not None
        progress = loaded
    checkpoints = Checkpoints(Storage(str(directory / name)), config=saved, identity="it", ranks=ranks, log=log)
    while progress.step < STEPS:
        lr = learning_rate(progress.step, steps=config.steps, config=config.optim)
        with traffic.look(progress.step):
            loss, norm, _ = train_step(
                progress.step,
                config,
                model=laid.run,
                optimizer=optimizer,
                cursor=batches,
                lr=lr,
                ranks=ranks,
                stop=stop,
            )
        found.append((loss, norm))
        progress.advance(loss, step=progress.step + 1)
        if outer:
            outer.after_step(progress.step) if progress.step < STEPS else outer.finish(progress.step)
        if progress.step == test.get("save_at"):
            checkpoints.save(progress, laid.parts, optimizer, **(outer.state() if outer else {}))
    checkpoints.wait()
    numbers = sum(parameter.numel() for parameter in laid.module.parameters())
    return {"curve": found, "weights": every_weight(laid, ranks), "traffic": traffic.step, "parameters": numbers}


def every_weight(laid: Laid, ranks: Ranks) -> list[float]:
    """The sum of the weights that each rank holds."""
    own = torch.zeros(ranks.world, dtype=torch.float64)
    local = (getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in laid.module.parameters())
    own[ranks.rank] = sum(float(part.double().sum()) for part in local)
    return ranks.sum(own).tolist()


def run_rank(rank: int, world: int, out: str, layouts: dict[str, dict[str, Any]]) -> None:
    directory = Path(out)
    torch.set_num_threads(1)
    make_deterministic(0)
    store = dist.FileStore(str(directory / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for name, more in layouts.items():
        test = more.pop("test", {})
        config = config_of(more)
        layout, apart = layout_of(config, world=world), config.local_sgd is not None
        ranks = place(layout, rank=rank, device=torch.device("cpu"), independent_replicas=apart)
        found[name] = curve(config, ranks, directory, name=name, test=test)
    if rank == 0:
        (directory / f"found-{world}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run_layouts(world: int, directory: Path, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `curve` found in each layout, on so many ranks."""
    cursor_of(directory, config_of({}))
    # Forked, the ranks share the seconds that imports take.
    torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        run_rank, (world, str(directory), layouts), nprocs=world, start_method="fork"
    )
    return json.loads((directory / f"found-{world}.json").read_text())
