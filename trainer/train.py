"""The training loop, top to bottom: resume, step, log, checkpoint, export."""

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trainer.alone import alone_with
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.data import Cursor, Dataset
from trainer.errors import Failed, Interrupted, RankGone, StopSignal
from trainer.files import digest_of
from trainer.finish import finish, finished
from trainer.kernels.decoder import why_not
from trainer.launches import MeetingSgd, which_replica
from trainer.layout import Layout, fit_dataset, layout_of
from trainer.local_sgd import LocalSgd, trained
from trainer.log import Log
from trainer.optim import learning_rate, make_optimizer
from trainer.package import Origin, begin_from
from trainer.parallel import Ranks, join_ranks, lay_out
from trainer.parallel.memory import plain_name
from trainer.probe import Probe
from trainer.progress import Progress, Remaining
from trainer.reports import Reports
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
    begun_s, rank = time.monotonic(), int(os.environ.get("RANK", "0"))
    log = Log(rank=rank)
    layout = layout_of(config, world=int(os.environ.get("WORLD_SIZE", "1")))  # refused before any rank is waited for
    dataset = Dataset.open(data)
    fit_dataset(config, vocab_size=dataset.vocab_size)
    origin = Origin.of(base, dataset=dataset, lora=config.lora is not None)
    skipped = finished(config, dataset, run, origin)
    if not skipped:
        make_deterministic(config.seed)
        run.mkdir(parents=True, exist_ok=True)
        storage = Storage(checkpoints or str(run / "checkpoints"))
        for path in earlier_hangs(run):
            log.emit("hung", level="warning", message=f"an earlier start hung, and {path} says where")
        if not torch.cuda.is_available() and (reason := why_not()):
            log.emit("slow_kernels", level="warning", message=f"torch alone computes: {reason}")
        alone = nullcontext() if rank else alone_with(run, stop=stop, log=log)
        with alone, Watchdog(run, rank=rank, timeout_s=config.recover.hang_timeout_s) as watchdog:
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
            training = _Training(config, dataset, run, ranks=ranks, probe=probe, **more)
            training.resume()
            training.steps()
            training.finish()
    except RuntimeError as error:
        if isinstance(error, Failed) or not any(word in str(error) for word in ("gloo", "NCCL")):
            raise
        raise RankGone(world=ranks.world) from None
    finally:
        ranks.leave()


class _Training:
    """A run on one rank: `resume`, `steps` and `finish`, in this order."""

    def __init__(
        self,
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
        self._config, self._dataset, self._run, self._ranks, self._origin = config, dataset, run, ranks, origin
        self._storage, self._stop, self._log, self._watchdog = storage, stop, log, watchdog
        self._probe, self._on_step = probe, on_step
        low_precision = computes_in_bfloat16(config.dtype, ranks.device)
        vocab_size, labels = dataset.vocab_size, None if dataset.labels is None else len(dataset.labels)
        self._laid = lay_out(config, vocab_size=vocab_size, ranks=ranks, low_precision=low_precision, labels=labels)
        if origin.package is not None:
            begin_from(self._laid.parts, origin.package, plain_name=plain_name)
        self._optimizer = make_optimizer(self._laid.module, config.optim)
        draws = {"seq": config.seq, "global_batch": config.global_batch, "seed": config.seed}
        self._cursor = Cursor.of(dataset, **draws, document_mask=config.document_mask)
        made_of = {"config": config.run_digest(), "data": dataset.digest, **origin.identity, "format": 2}
        # Replicas that train apart have each a state of its own.
        apart = {"replicas": ranks.replicas, "launch": ranks.launch} if config.local_sgd else {}
        identity = digest_of({**made_of, **apart})
        self._checkpoints = Checkpoints(storage, config=config.checkpoint, identity=identity, ranks=ranks, log=log)
        outputs = vocab_size if labels is None else labels
        self._reports = Reports(config, run, ranks=ranks, outputs=outputs, cursor=self._cursor, log=log)
        registry = self._reports.metrics.registry
        self._traffic = Traffic(every_steps=config.look_at_traffic_every_steps, registry=registry, log=log)
        self._outer = self._averaging({**made_of, "layout": asdict(ranks.layout)} if ranks.layout else made_of)
        self._progress, self._skips = Progress(), 0

    def _averaging(self, made_of: dict[str, Any]) -> LocalSgd | None:
        """Of replicas that train apart; those that are launches of their own meet if they are made of the same."""
        local = self._config.local_sgd
        if local is None or local.launches is None:
            return LocalSgd.of(local, self._laid.parts, self._ranks)
        return MeetingSgd(
            trained(self._laid.parts),
            optimizer=self._optimizer,
            config=local,
            purpose=digest_of(made_of),
            ranks=self._ranks,
            watchdog=self._watchdog,
            timeout_s=self._config.recover.hang_timeout_s,
            log=self._log,
        )

    def _more(self) -> dict[str, Any]:
        """What a checkpoint has beside weights and moments."""
        return self._outer.state() if self._outer else {}

    def resume(self) -> None:
        """From the newest checkpoint, where there is one, and from where the other replicas are."""
        found = self._checkpoints.load_newest(self._laid.parts, self._optimizer, **self._more())
        self._progress = found or self._progress
        if self._progress.step:
            self._log.emit("resumed", stage="train", step=self._progress.step)
        if self._outer:
            self._progress.step = self._outer.join(self._progress.step)
        self._reports.begin(self._progress.step)

    def steps(self) -> None:
        """All that are left. Raises Interrupted between two of them, with the state on disk."""
        first = self._progress.step
        while self._progress.step < self._config.steps:
            self._watchdog.beat(patience=STARTING if self._progress.step == first else 1.0)
            if self._on_step is not None:
                self._on_step(self._progress.step, self._ranks)
            self._probe.before_step(self._progress.step)
            try:
                stopping = self._step()
            except BadStep as error:
                self._go_back(error)
                continue
            done = self._progress.step
            self._save(last=stopping or done == self._config.steps)
            if stopping and done < self._config.steps:
                raise Interrupted(f"stopped after step {done} of {self._config.steps}; the checkpoint is written")

    def _step(self) -> bool:
        """One step, told in the reports; returns whether to stop after it."""
        config, progress, began_s = self._config, self._progress, time.monotonic()
        lr = learning_rate(progress.step, steps=config.steps, config=config.optim)
        with self._traffic.look(progress.step):
            loss, norm, stopping = train_step(
                progress.step,
                config,
                model=self._laid.run,
                optimizer=self._optimizer,
                cursor=Remaining(self._cursor, progress),
                lr=lr,
                ranks=self._ranks,
                stop=self._stop,
                most=_most_bearable(config, progress),
            )
            done = progress.step + 1
            if self._outer:
                done = self._outer.after_step(done) if done < config.steps else self._outer.finish(done)
        progress.advance(loss, step=done)
        self._reports.step_done(done, loss=loss, lr=lr, grad_norm=norm, seconds=time.monotonic() - began_s)
        return stopping

    def _save(self, *, last: bool) -> None:
        """A checkpoint where one is due; the last is waited for."""
        if last or self._progress.step % self._config.checkpoint.every_steps == 0:
            self._watchdog.beat(patience=4)
            self._checkpoints.save(self._progress, self._laid.parts, self._optimizer, **self._more())
        if last:
            self._checkpoints.wait()
        if last and self._outer:
            self._outer.leave()
        self._checkpoints.poll()
        self._reports.checkpointed(self._checkpoints.saved_step, seconds=self._checkpoints.seconds)

    def _go_back(self, error: BadStep) -> None:
        """To the newest checkpoint, with the batch of the bad step left out from now on; or raises the error again.

        Before the first checkpoint only the batch is left out: the bad step was not made.
        """
        self._skips += 1
        if self._config.recover.bad_step == "stop" or self._skips > self._config.recover.max_skips:
            raise error
        bad, skipped = self._progress.batch_of(self._progress.step), self._progress.skipped
        self._optimizer.zero_grad()
        self._checkpoints.wait()
        found = self._checkpoints.load_newest(self._laid.parts, self._optimizer, **self._more())
        self._progress = found or self._progress
        self._progress.skipped = sorted({*self._progress.skipped, *skipped, bad})
        step, skipped = self._progress.step, self._progress.skipped
        self._log.emit("went_back", level="warning", step=step, skipped=skipped, message=str(error))
        self._reports.begin(step)

    def finish(self) -> None:
        """Plots and package, by the first rank."""
        self._reports.close()
        self._watchdog.beat(patience=4)
        if self._ranks.first:
            checkpoint = self._storage.url(self._config.steps)
            rows = self._reports.history.rows()
            finish(
                self._config,
                self._dataset,
                self._run,
                self._laid,
                checkpoint,
                ranks=self._ranks,
                origin=self._origin,
                rows=rows,
            )
        self._ranks.barrier()


def _most_bearable(config: TrainConfig, progress: Progress) -> float:
    """The loss above which a step counts as bad."""
    if config.recover.spike_factor is None or progress.loss_mean is None or progress.step < config.optim.warmup_steps:
        return math.inf
    return config.recover.spike_factor * progress.loss_mean
