"""The training loop, top to bottom: resume, step, log, checkpoint, export."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.data import Cursor, Dataset
from trainer.errors import Failed, Interrupted, StopSignal
from trainer.export import Read, export_package
from trainer.files import digest_of, read_json
from trainer.history import History
from trainer.launches import MeetingSgd, which_replica
from trainer.layout import Layout, fit_dataset, layout_of
from trainer.local_sgd import LocalSgd, trained
from trainer.log import Log
from trainer.model import Decoder
from trainer.optim import learning_rate, make_optimizer
from trainer.package import Origin, begin_from, make_decoder
from trainer.parallel import Laid, Ranks, join_ranks, lay_out
from trainer.parallel.memory import plain_name
from trainer.probe import Probe
from trainer.progress import Progress, Remaining
from trainer.provenance import hardware, source_revision
from trainer.reports import Reports
from trainer.state import load_weights
from trainer.step import BadStep, computes_in_bfloat16, make_deterministic, train_step
from trainer.storage import Storage
from trainer.traffic import Traffic
from trainer.watchdog import STARTING, Watchdog, earlier_hangs

OnStep = Callable[[int, Ranks], None]
"""Called on every rank before each step with the number of steps done: where faults are rehearsed."""


def train(
    config: TrainConfig,
    *,
    data: Path,
    run: Path,
    stop: StopSignal,
    base: Path | None = None,
    checkpoints: str | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Trains the model of `config` on the dataset in `data` to a package in `run/model/`, from where it last stopped.

    It begins from the weights of the package `base`, where there is one. `checkpoints` is the fsspec URL of a place for
    them, when it is not in the run directory.

    Raises Refused for a config, dataset or run directory that cannot work, Failed for a loss that is not finite or a
    disk that is full, Interrupted when `stop` was received and the state is on disk.
    """
    begun_s = time.monotonic()
    log = Log(rank=int(os.environ.get("RANK", "0")))
    layout = layout_of(config, world=int(os.environ.get("WORLD_SIZE", "1")))  # refused before any rank is waited for
    dataset = Dataset.open(data)
    fit_dataset(config, vocab_size=dataset.vocab_size, documents=config.document_mask or dataset.task != "text")
    origin = Origin.of(base, dataset=dataset, lora=config.lora is not None)
    skipped = _finished(config, dataset, run, origin)
    if not skipped:
        make_deterministic(config.seed)
        run.mkdir(parents=True, exist_ok=True)
        storage = Storage(checkpoints or str(run / "checkpoints"))
        for path in earlier_hangs(run):
            log.emit("hung", level="warning", message=f"an earlier start hung, and {path} says where")
        with Watchdog(run, rank=int(os.environ.get("RANK", "0")), timeout_s=config.recover.hang_timeout_s) as watchdog:
            parts = {"origin": origin, "storage": storage, "stop": stop, "log": log, "watchdog": watchdog}
            _train_together(config, dataset, run, layout, on_step=on_step, **parts)
    if (run / "loss.png").exists():
        log.emit("artifact", kind="plot", path=str(run / "loss.png"))
    log.emit("artifact", kind="model", path=str(run / "model"))
    log.emit("done", stage="train", seconds=round(time.monotonic() - begun_s, 2), skipped=skipped)


def _train_together(config: TrainConfig, dataset: Dataset, run: Path, layout: Layout, **more: Any) -> None:
    """Joins the ranks, trains, and leaves them; a rank that has gone is told as that."""
    # Of a hang the watchdog is to know first, because it tells the stacks.
    patience_s = 2 * config.recover.hang_timeout_s
    local = config.local_sgd
    launch, together = (which_replica(local), False) if local and local.launches else (0, local is not None)
    ranks = join_ranks(layout, independent_replicas=together, launch=launch, timeout_s=patience_s)
    try:
        with Probe(run, rank=ranks.rank, device=ranks.device, log=more["log"]) as probe:
            _train(config, dataset, run, ranks=ranks, probe=probe, **more)
    except RuntimeError as error:
        if isinstance(error, Failed) or not any(word in str(error) for word in ("gloo", "NCCL")):
            raise
        fix = "See the log of the rank that ended first; under torchrun all begin again from the newest checkpoint."
        raise Failed("another rank has gone", where=f"rank {ranks.rank} of {ranks.world}", fix=fix) from None
    finally:
        ranks.leave()


def _train(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    *,
    ranks: Ranks,
    origin: Origin,
    storage: Storage,
    stop: StopSignal,
    log: Log,
    watchdog: Watchdog,
    probe: Probe,
    on_step: OnStep | None,
) -> None:
    low_precision = computes_in_bfloat16(config.dtype, ranks.device)
    labels = None if dataset.labels is None else len(dataset.labels)
    laid = lay_out(config, vocab_size=dataset.vocab_size, ranks=ranks, low_precision=low_precision, labels=labels)
    if origin.package is not None:
        begin_from(laid.parts, origin.package, plain_name=plain_name)
    optimizer = make_optimizer(laid.module, config.optim)
    cursor = Cursor.of(
        dataset,
        seq=config.seq,
        global_batch=config.global_batch,
        seed=config.seed,
        document_mask=config.document_mask,
    )
    made_of = {"config": config.run_digest(), "data": dataset.digest, **origin.identity, "format": 2}
    # Replicas that train apart have each a state of its own.
    apart = {"replicas": ranks.replicas, "launch": ranks.launch} if config.local_sgd else {}
    identity = digest_of({**made_of, **apart})
    checkpoints = Checkpoints(storage, config=config.checkpoint, identity=identity, ranks=ranks, log=log)
    outputs = dataset.vocab_size if labels is None else labels
    reports = Reports(config, run, ranks=ranks, outputs=outputs, cursor=cursor, log=log)
    traffic = Traffic(every_steps=config.look_at_traffic_every_steps, registry=reports.metrics.registry, log=log)
    made_of |= {"layout": asdict(ranks.layout)} if ranks.layout else {}
    outer = _outer_of(config, laid, optimizer, ranks=ranks, made_of=made_of, watchdog=watchdog, log=log)

    def more() -> dict[str, Any]:
        return outer.state() if outer else {}

    progress = checkpoints.load_newest(laid.parts, optimizer, **more()) or Progress()
    if progress.step:
        log.emit("resumed", stage="train", step=progress.step)
    if outer:
        progress.step = outer.join(progress.step)
    reports.begin(progress.step)
    skips = 0

    first = progress.step
    while progress.step < config.steps:
        watchdog.beat(patience=STARTING if progress.step == first else 1.0)
        if on_step is not None:
            on_step(progress.step, ranks)
        probe.before_step(progress.step)
        step_began_s = time.monotonic()
        lr = learning_rate(progress.step, steps=config.steps, config=config.optim)
        try:
            with traffic.look(progress.step):
                loss, norm, stopping = train_step(
                    progress.step,
                    config,
                    model=laid.run,
                    optimizer=optimizer,
                    cursor=Remaining(cursor, progress),
                    lr=lr,
                    ranks=ranks,
                    stop=stop,
                    most=_most_bearable(config, progress),
                )
                done = progress.step + 1
                if outer:
                    done = outer.after_step(done) if done < config.steps else outer.finish(done)
        except BadStep as error:
            skips += 1
            if config.recover.bad_step == "stop" or skips > config.recover.max_skips:
                raise
            progress = _go_back(progress, checkpoints, laid, optimizer, **more())
            log.emit("went_back", level="warning", step=progress.step, skipped=progress.skipped, message=str(error))
            reports.begin(progress.step)
            continue
        progress.advance(loss, step=done)
        reports.step_done(done, loss=loss, lr=lr, grad_norm=norm, seconds=time.monotonic() - step_began_s)

        last = stopping or done == config.steps
        if last or done % config.checkpoint.every_steps == 0:
            watchdog.beat(patience=4)
            checkpoints.save(progress, laid.parts, optimizer, **more())
        if last:
            checkpoints.wait()
        if last and outer:
            outer.leave()
        checkpoints.poll()
        reports.checkpointed(checkpoints.saved_step, seconds=checkpoints.seconds)
        if stopping and done < config.steps:
            raise Interrupted(f"stopped after step {done} of {config.steps}; the checkpoint is written")

    reports.close()
    watchdog.beat(patience=4)
    if ranks.first:
        model, read = _whole_model(config, dataset, laid, storage.url(config.steps), ranks=ranks)
        _finish(config, dataset, run, model=model, read=read, origin=origin, history=reports.history)
    ranks.barrier()


def _outer_of(
    config: TrainConfig, laid: Laid, optimizer: torch.optim.Optimizer, *, made_of: dict[str, Any], **more: Any
) -> LocalSgd | None:
    """What averages replicas that train apart; those that are launches of their own meet if they are made of the same."""
    if config.local_sgd is None or config.local_sgd.launches is None:
        return LocalSgd.of(config.local_sgd, laid.parts, more["ranks"])
    timeout_s, purpose = config.recover.hang_timeout_s, digest_of(made_of)
    more |= {"optimizer": optimizer, "config": config.local_sgd, "purpose": purpose, "timeout_s": timeout_s}
    return MeetingSgd(trained(laid.parts), **more)


def _most_bearable(config: TrainConfig, progress: Progress) -> float:
    """The loss above which a step counts as bad."""
    if config.recover.spike_factor is None or progress.loss_mean is None or progress.step < config.optim.warmup_steps:
        return math.inf
    return config.recover.spike_factor * progress.loss_mean


def _go_back(
    progress: Progress, checkpoints: Checkpoints, laid: Laid, optimizer: torch.optim.Optimizer, **more: Any
) -> Progress:
    """The state of the newest checkpoint, with the batch of the bad step left out from now on.

    Before the first checkpoint only the batch is left out: the bad step was not made.
    """
    bad = progress.batch_of(progress.step)
    optimizer.zero_grad()
    checkpoints.wait()
    earlier = checkpoints.load_newest(laid.parts, optimizer, **more) or progress
    earlier.skipped = sorted({*earlier.skipped, *progress.skipped, bad})
    return earlier


def _finished(config: TrainConfig, dataset: Dataset, run: Path, origin: Origin) -> bool:
    """The package appears whole or not at all, and says what it was made from."""
    wanted = {"config_digest": config.run_digest(), "data_digest": dataset.digest, **origin.identity}
    provenance = read_json(run / "model" / "slipway.json")
    return provenance is not None and all(provenance.get(name) == digest for name, digest in wanted.items())


def _whole_model(
    config: TrainConfig, dataset: Dataset, laid: Laid, checkpoint: str, *, ranks: Ranks
) -> tuple[Decoder, Read | None]:
    """The model as it lies on this rank, or where ranks share it its shape, and how to read its last checkpoint."""
    if ranks.mesh is None:
        return laid.parts[0], None
    labels = None if dataset.labels is None else len(dataset.labels)
    with torch.device("meta"):
        model = make_decoder(config, vocab_size=dataset.vocab_size, labels=labels)
    shapes, replica = dict(model.named_parameters()), 0 if ranks.independent_replicas else None

    def read(names: list[str]) -> dict[str, Tensor]:
        weights = {name: torch.empty(shapes[name].shape) for name in names}
        load_weights(weights, checkpoint, replica=replica)
        return weights

    return model, read


def _finish(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    *,
    model: Decoder,
    read: Read | None,
    origin: Origin,
    history: History,
) -> None:
    from trainer.plot import (  # matplotlib takes a second to load, and a resumed run may never come here
        plot_cost,
        plot_loss,
    )

    rows = history.rows()
    plot_loss(
        rows, run / "loss.png", title=f"Training loss · {config.steps:,} steps · {rows[-1]['loss']:.3f} at the end"
    )
    plot_cost(rows, run / "cost.png", title="Speed, and where time and memory went")
    export_package(
        model,
        dataset,
        run / "model",
        provenance={
            "config_digest": config.run_digest(),
            "data_digest": dataset.digest,
            **origin.identity,
            "source_revision": source_revision(),
            "steps": config.steps,
            "tokens": config.steps * config.global_batch * config.seq,
            "losses": {"first": rows[0]["loss"], "final": rows[-1]["loss"]},
            "hardware": hardware(),
        },
        lora=config.lora,
        base=origin.package,
        read=read,
    )
