"""The training loop, top to bottom: resume, step, log, checkpoint, export."""

import math
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.data import Cursor, Dataset
from trainer.errors import Failed, Interrupted, StopSignal
from trainer.export import export_package
from trainer.files import digest_of, read_json
from trainer.history import History
from trainer.log import Log
from trainer.metrics import TrainMetrics
from trainer.model import Decoder
from trainer.optim import learning_rate, make_optimizer
from trainer.parallel import Ranks, join_ranks, parallelize, without_sync
from trainer.provenance import hardware, source_revision


def train(config: TrainConfig, *, data: Path, run: Path, stop: StopSignal) -> None:
    """Trains the model of `config` on the dataset in `data` to a package in `run/model/`, from where it last stopped.

    Raises Refused for a config, dataset or run directory that cannot work, Failed for a loss that is not finite or a
    disk that is full, Interrupted when `stop` was received and the state is on disk.
    """
    begun_s = time.monotonic()
    log = Log(rank=int(os.environ.get("RANK", "0")))
    config.grad_accum(int(os.environ.get("WORLD_SIZE", "1")))  # refused before any rank is waited for
    dataset = Dataset.open(data)
    if not _finished(config, dataset, run):
        make_deterministic(config.seed)
        ranks = join_ranks()
        try:
            _train(config, dataset, run, ranks=ranks, stop=stop, log=log)
        except RuntimeError as error:
            if isinstance(error, Failed) or "gloo" not in str(error):
                raise
            fix = "See the log of the rank that ended first; under torchrun all begin again from the newest checkpoint."
            raise Failed("another rank has gone", where=f"rank {ranks.rank} of {ranks.world}", fix=fix) from None
        finally:
            ranks.leave()
        skipped = False
    else:
        skipped = True
    if (run / "loss.png").exists():
        log.emit("artifact", kind="plot", path=str(run / "loss.png"))
    log.emit("artifact", kind="model", path=str(run / "model"))
    log.emit("done", stage="train", seconds=round(time.monotonic() - begun_s, 2), skipped=skipped)


def _train(config: TrainConfig, dataset: Dataset, run: Path, *, ranks: Ranks, stop: StopSignal, log: Log) -> None:
    run.mkdir(parents=True, exist_ok=True)
    metrics = TrainMetrics()
    if ranks.first:
        metrics.serve()
    model = Decoder(config.model, vocab_size=dataset.vocab_size).to(ranks.device)
    optimizer = make_optimizer(model, config.optim)
    cursor = Cursor(dataset.tokens("train"), seq=config.seq, global_batch=config.global_batch, seed=config.seed)
    identity = digest_of({"config": config.run_digest(), "data": dataset.digest})
    checkpoints = Checkpoints(run, keep=config.checkpoint.keep, identity=identity, ranks=ranks, log=log)
    history = History(run)

    start = checkpoints.load_newest(model, optimizer)
    if start:
        log.emit("resumed", stage="train", step=start)
    if ranks.first:
        history.begin(start)
    parallel = parallelize(model, ranks)
    step_tokens = config.global_batch * config.seq
    metrics.steps.set(config.steps)
    mark_s, mark_step = time.monotonic(), start

    for step in range(start, config.steps):
        lr = learning_rate(step, steps=config.steps, config=config.optim)
        loss, norm, stopping = train_step(
            step, config, model=parallel, optimizer=optimizer, cursor=cursor, lr=lr, ranks=ranks, stop=stop
        )
        done = step + 1

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

        if stopping or done % config.checkpoint.every_steps == 0 or done == config.steps:
            checkpoints.save(done, model, optimizer)
            metrics.checkpoint_seconds.set(time.monotonic() - now_s)
            metrics.last_checkpoint_step.set(done)
        if stopping and done < config.steps:
            raise Interrupted(f"stopped after step {done} of {config.steps}; the checkpoint is written")

    if ranks.first:
        _finish(config, dataset, run, model=model, history=history)
    ranks.barrier()


def train_step(
    step: int,
    config: TrainConfig,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    cursor: Cursor,
    lr: float,
    ranks: Ranks,
    stop: StopSignal,
) -> tuple[float, float, bool]:
    """One optimizer step: the mean loss over the global batch, the norm before clipping, and whether to stop after it.

    Raises Failed, before the step is made, for a loss or gradients that are not finite.
    """
    grad_accum = config.grad_accum(ranks.world)
    autocast = precision(config.dtype, ranks.device)
    loss_sum = torch.zeros((), device=ranks.device)
    for micro in range(grad_accum):
        tokens = cursor.batch(step, micro=micro, micro_batch=config.micro_batch, rank=ranks.rank, world=ranks.world)
        tokens_BL = torch.from_numpy(tokens).to(ranks.device, non_blocking=True)
        with without_sync(model, last=micro == grad_accum - 1):
            with autocast:
                loss = model(tokens_BL[:, :-1], tokens_BL[:, 1:]) / grad_accum
            loss.backward()
        loss_sum += loss.detach()

    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
    mean_loss, norm, stopping = _agree(loss_sum, norm, stop, ranks)
    if not (math.isfinite(mean_loss) and math.isfinite(norm)):
        raise Failed(
            f"the loss is {mean_loss:g} and the norm of the gradients {norm:g} at step {step + 1}; the step was not made",
            where=f"optim.lr {lr:g}",
            fix="Lower optim.lr or raise optim.warmup_steps; the checkpoints before it are kept.",
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return mean_loss, norm, stopping


def _agree(loss_sum: torch.Tensor, norm: torch.Tensor, stop: StopSignal, ranks: Ranks) -> tuple[float, float, bool]:
    """Mean loss over ranks, the norm, and whether any rank was told to stop: the one wait for the device in a step.

    It has to be before the optimizer step, because a step with a loss that is not finite must not be made.
    """
    told = torch.tensor(float(stop.received is not None), device=ranks.device)
    shared = ranks.sum(torch.stack([loss_sum / ranks.world, told]))
    mean_loss, any_told, norm_now = torch.cat([shared, norm.unsqueeze(0)]).tolist()
    return mean_loss, norm_now, any_told > 0


def make_deterministic(seed: int) -> None:
    """The same numbers at every run of the same program on the same kind of machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it has not written, so fresh memory need not be filled.
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    torch.manual_seed(seed)


def precision(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 where asked for or, with `auto`, where the hardware computes in it; weights stay float32."""
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bfloat16()
    use = dtype == "bfloat16" or (dtype == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16, enabled=use)


def cpu_has_bfloat16() -> bool:
    """AVX-512 BF16 or AMX; without them bfloat16 on a CPU is emulated and slower than float32."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    return capabilities.startswith("AVX512") and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _finished(config: TrainConfig, dataset: Dataset, run: Path) -> bool:
    provenance = read_json(run / "model" / "slipway.json") or {}
    made_from = (provenance.get("config_digest"), provenance.get("data_digest"))
    return made_from == (config.run_digest(), dataset.digest) and (run / "model" / "model.safetensors").is_file()


def _finish(config: TrainConfig, dataset: Dataset, run: Path, *, model: Decoder, history: History) -> None:
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
            "source_revision": source_revision(),
            "steps": config.steps,
            "tokens": config.steps * config.global_batch * config.seq,
            "losses": {"first": rows[0]["loss"], "final": rows[-1]["loss"]},
            "hardware": hardware(),
        },
    )
