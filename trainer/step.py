"""One optimizer step, and the numbers it is computed in."""

import math
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.errors import Failed, StopSignal
from trainer.loss import IGNORED
from trainer.optim import step_by
from trainer.parallel import Ranks, accumulate, gradient_norm
from trainer.parallel.pipeline import Pipeline
from trainer.progress import Batches


class BadStep(Failed):
    """A loss or gradients that no step is to be made with; the weights are as they were."""


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
    targets = sum(int(np.count_nonzero(batch.targets_BL != IGNORED)) for batch in drawn)
    batches = [batch.tensors(ranks.device) for batch in drawn]
    loss_sum = accumulate(model, batches, ranks=ranks, autocast=precision(config.dtype, ranks.device))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = gradient_norm(model, parameters, ranks=ranks)
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
    for group in optimizer.param_groups:
        group["lr"] = lr
    step_by(optimizer, to_mean * min(1.0, config.optim.grad_clip / (norm + 1e-6)))
    optimizer.zero_grad()
    return agreed.loss, norm, agreed.stopping


@dataclass(frozen=True)
class _Agreed:
    loss: float
    replica_targets: float
    norm: float
    stopping: bool


def _agree(loss_sum: Tensor, targets: int, norm: Tensor, stop: StopSignal, ranks: Ranks) -> _Agreed:
    """What all ranks know after one all-reduce of a few numbers, and the one wait for the device in a step.

    It has to be before the optimizer step, because a step with a loss that is not finite must not be made.
    """
    stopping = stop.received is not None
    if ranks.world == 1:
        loss, norm_now = torch.stack([loss_sum, norm]).tolist()
        return _Agreed(loss / max(targets, 1), max(targets, 1), norm_now, stopping)
    known = [0.0, 0.0, float(stopping), *[0.0] * ranks.replicas]
    if ranks.counts_targets:
        known[1] = known[3 + ranks.replica] = float(targets)
    shared = torch.tensor(known, dtype=torch.float64, device=ranks.device)
    if ranks.counts_loss:
        shared[0] = loss_sum
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


@cache
def cpu_has_bfloat16() -> bool:
    """AVX-512 BF16 or AMX; without them bfloat16 on a CPU is emulated and slower than float32."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    return capabilities.startswith("AVX512") and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
