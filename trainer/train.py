"""The training loop, top to bottom: resume, step, log, checkpoint, export."""

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.data import Cursor, Dataset
from trainer.errors import Failed, Interrupted, StopSignal
from trainer.export import Read, export_package
from trainer.files import digest_of, read_json
from trainer.history import History
from trainer.layout import Layout, fit_dataset, layout_of
from trainer.log import Log
from trainer.loss import IGNORED
from trainer.metrics import TrainMetrics
from trainer.model import Decoder
from trainer.optim import learning_rate, make_optimizer
from trainer.package import Origin, begin_from, make_decoder
from trainer.parallel import Laid, Ranks, accumulate, gradient_norm, join_ranks, lay_out, scale_gradients
from trainer.parallel.memory import plain_name
from trainer.parallel.pipeline import Pipeline
from trainer.progress import Batches, Progress, Remaining
from trainer.provenance import hardware, source_revision
from trainer.state import load_weights
from trainer.watchdog import Watchdog, earlier_hangs

OnStep = Callable[[int, Ranks], None]
"""Called on every rank before each step with the number of steps done: where faults are rehearsed."""


class BadStep(Failed):
    """A loss or gradients that no step is to be made with; the weights are as they were."""


def train(
    config: TrainConfig,
    *,
    data: Path,
    run: Path,
    stop: StopSignal,
    base: Path | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Trains the model of `config` on the dataset in `data` to a package in `run/model/`, from where it last stopped.

    It begins from the weights of the package `base`, where there is one.

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
        for path in earlier_hangs(run):
            log.emit("hung", level="warning", message=f"an earlier start hung, and {path} says where")
        with Watchdog(run, rank=int(os.environ.get("RANK", "0")), timeout_s=config.recover.hang_timeout_s) as watchdog:
            _train_together(
                config, dataset, run, layout, origin=origin, stop=stop, log=log, watchdog=watchdog, on_step=on_step
            )
    if (run / "loss.png").exists():
        log.emit("artifact", kind="plot", path=str(run / "loss.png"))
    log.emit("artifact", kind="model", path=str(run / "model"))
    log.emit("done", stage="train", seconds=round(time.monotonic() - begun_s, 2), skipped=skipped)


def _train_together(config: TrainConfig, dataset: Dataset, run: Path, layout: Layout, **more: Any) -> None:
    """Joins the ranks, trains, and leaves them; a rank that has gone is told as that."""
    # Of a hang the watchdog is to know first, because it tells the stacks.
    patience_s = 2 * config.recover.hang_timeout_s
    ranks = join_ranks(layout, independent_replicas=config.local_sgd is not None, timeout_s=patience_s)
    try:
        _train(config, dataset, run, ranks=ranks, **more)
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
    stop: StopSignal,
    log: Log,
    watchdog: Watchdog,
    on_step: OnStep | None,
) -> None:
    metrics = TrainMetrics()
    if ranks.first:
        metrics.serve()
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
    identity = digest_of({"config": config.run_digest(), "data": dataset.digest, **origin.identity, "format": 2})
    checkpoints = Checkpoints(run, config=config.checkpoint, identity=identity, ranks=ranks, log=log)
    history = History(run)

    progress = checkpoints.load_newest(laid.parts, optimizer) or Progress()
    if progress.step:
        log.emit("resumed", stage="train", step=progress.step)
    if ranks.first:
        history.begin(progress.step)
    step_tokens = config.global_batch * config.seq
    metrics.steps.set(config.steps)
    mark_s, mark_step, skips = time.monotonic(), progress.step, 0

    while progress.step < config.steps:
        watchdog.beat()
        if on_step is not None:
            on_step(progress.step, ranks)
        lr = learning_rate(progress.step, steps=config.steps, config=config.optim)
        try:
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
        except BadStep as error:
            skips += 1
            if config.recover.bad_step == "stop" or skips > config.recover.max_skips:
                raise
            progress = _go_back(progress, checkpoints, laid, optimizer)
            log.emit("went_back", level="warning", step=progress.step, skipped=progress.skipped, message=str(error))
            if ranks.first:
                history.begin(progress.step)
            mark_s, mark_step = time.monotonic(), progress.step
            continue
        progress.advance(loss)
        done = progress.step

        now_s = time.monotonic()
        rate = (done - mark_step) * step_tokens / (now_s - mark_s)
        row: dict[str, Any] = {"step": done, "loss": loss, "lr": lr, "tokens_per_s": round(rate, 1)}
        log.progress("train", done=done, total=config.steps, unit="steps", **row)
        metrics.tokens.inc(step_tokens)
        if done % config.log_every_steps == 0 or done == config.steps:
            if ranks.first:
                history.append(**row, grad_norm=norm)
            metrics.show(**row, grad_norm=norm)
            mark_s, mark_step = now_s, done

        last = stopping or done == config.steps
        if last or done % config.checkpoint.every_steps == 0:
            watchdog.beat(patience=4)
            checkpoints.save(progress, laid.parts, optimizer)
        if last:
            checkpoints.wait()
        checkpoints.poll()
        metrics.checkpoint_seconds.set(checkpoints.seconds)
        metrics.last_checkpoint_step.set(checkpoints.saved_step)
        if stopping and done < config.steps:
            raise Interrupted(f"stopped after step {done} of {config.steps}; the checkpoint is written")

    watchdog.beat(patience=4)
    if ranks.first:
        model, read = _whole_model(config, dataset, laid, checkpoints.path(config.steps), ranks=ranks)
        _finish(config, dataset, run, model=model, read=read, origin=origin, history=history)
    ranks.barrier()


def _most_bearable(config: TrainConfig, progress: Progress) -> float:
    """The loss above which a step counts as bad."""
    if config.recover.spike_factor is None or progress.loss_mean is None or progress.step < config.optim.warmup_steps:
        return math.inf
    return config.recover.spike_factor * progress.loss_mean


def _go_back(progress: Progress, checkpoints: Checkpoints, laid: Laid, optimizer: torch.optim.Optimizer) -> Progress:
    """The state of the newest checkpoint, with the batch of the bad step left out from now on.

    Before the first checkpoint only the batch is left out: the bad step was not made.
    """
    bad = progress.batch_of(progress.step)
    optimizer.zero_grad()
    checkpoints.wait()
    earlier = checkpoints.load_newest(laid.parts, optimizer) or progress
    earlier.skipped = sorted({*earlier.skipped, *progress.skipped, bad})
    return earlier


def train_step(
    step: int,
    config: TrainConfig,
    *,
    model: nn.Module | Pipeline,
    optimizer: torch.optim.Optimizer,
    cursor: Batches,
    lr: float,
    ranks: Ranks,
    stop: StopSignal,
    most: float = math.inf,
) -> tuple[float, float, bool]:
    """One optimizer step: the mean loss over the global batch, the norm before clipping, and whether to stop after it.

    The mean is over all targets that count, on whichever rank they are. Raises BadStep, before the step is made, for a
    loss or gradients that are not finite, and for a loss above `most`.
    """
    where = {"micro_batch": config.micro_batch, "rank": ranks.dp_rank, "world": ranks.dp}
    drawn = [cursor.batch(step, micro=micro, **where) for micro in range(config.grad_accum(ranks.dp))]
    batches = [batch.tensors(ranks.device) for batch in drawn]
    targets = torch.stack([(targets != IGNORED).sum() for _, targets, _ in batches]).sum()
    loss_sum = accumulate(model, batches, ranks=ranks, autocast=precision(config.dtype, ranks.device))
    norm = gradient_norm(model, ranks=ranks)
    agreed = _agree(loss_sum, targets, norm, stop, ranks)

    # Gradients are of sums so far, averaged over ranks: now they become those of the mean, no longer than grad_clip.
    to_mean = ranks.averaged_over / agreed.replica_targets
    norm = agreed.norm * to_mean
    if not (math.isfinite(agreed.loss) and math.isfinite(norm) and agreed.loss <= most):
        spike = f", above the bearable {most:.4g}" if agreed.loss > most else ""
        raise BadStep(
            f"the loss is {agreed.loss:g}{spike} and the norm of the gradients {norm:g} at step {step + 1}; "
            "the step was not made",
            where=f"optim.lr {lr:g}",
            fix="Lower optim.lr or raise optim.warmup_steps, or set recover.bad_step to skip; the checkpoints are kept.",
        )
    scale_gradients(model, to_mean * min(1.0, config.optim.grad_clip / (norm + 1e-6)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return agreed.loss, norm, agreed.stopping


@dataclass(frozen=True)
class _Agreed:
    loss: float
    replica_targets: float
    norm: float
    stopping: bool


def _agree(loss_sum: Tensor, targets: Tensor, norm: Tensor, stop: StopSignal, ranks: Ranks) -> _Agreed:
    """What all ranks know after one all-reduce of a few numbers, and the one wait for the device in a step.

    It has to be before the optimizer step, because a step with a loss that is not finite must not be made.
    """
    shared = torch.zeros(3 + ranks.replicas, dtype=torch.float64, device=ranks.device)
    shared[2] = float(stop.received is not None)
    if ranks.counts_loss:
        shared[0] = loss_sum
    if ranks.counts_targets:
        shared[1] = targets
        shared[3 + ranks.replica] = targets
    ranks.sum(shared)
    total, all_targets, told, *of_replicas, norm_now = torch.cat([shared, norm.double().unsqueeze(0)]).tolist()
    replica_targets = of_replicas[ranks.replica] if ranks.independent_replicas else all_targets
    return _Agreed(total / max(all_targets, 1), max(replica_targets, 1), norm_now, told > 0)


def make_deterministic(seed: int) -> None:
    """The same numbers at every run of the same program on the same kind of machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it has not written, so fresh memory need not be filled.
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    torch.manual_seed(seed)


def precision(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 where asked for or, with `auto`, where the hardware computes in it; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(dtype, device))


def computes_in_bfloat16(dtype: str, device: torch.device) -> bool:
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bfloat16()
    return dtype == "bfloat16" or (dtype == "auto" and native)


def cpu_has_bfloat16() -> bool:
    """AVX-512 BF16 or AMX; without them bfloat16 on a CPU is emulated and slower than float32."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    return capabilities.startswith("AVX512") and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _finished(config: TrainConfig, dataset: Dataset, run: Path, origin: Origin) -> bool:
    """The package appears whole or not at all, and says what it was made from."""
    wanted = {"config_digest": config.run_digest(), "data_digest": dataset.digest, **origin.identity}
    provenance = read_json(run / "model" / "slipway.json")
    return provenance is not None and all(provenance.get(name) == digest for name, digest in wanted.items())


def _whole_model(
    config: TrainConfig, dataset: Dataset, laid: Laid, checkpoint: Path, *, ranks: Ranks
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
    from trainer.plot import plot_loss  # matplotlib takes a second to load, and a resumed run may never come here

    rows = history.rows()
    plot_loss(
        rows, run / "loss.png", title=f"Training loss · {config.steps:,} steps · {rows[-1]['loss']:.3f} at the end"
    )
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
