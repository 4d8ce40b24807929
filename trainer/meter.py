"""What a run's steps cost: time, waiting, memory, floating-point operations; and how that compares with the plan.

The conventions are the planner's: a token costs 6·N + 12·L·a·d·s floating-point operations forward and backward (PaLM,
appendix B), N being the parameters that multiply an activation; MFU counts these alone, HFU also what is computed twice.
"""

import resource
import sys
import time
from typing import Any

import torch

from trainer.config import ModelConfig, TrainConfig
from trainer.data import Cursor


def flops_per_token(shape: ModelConfig, *, outputs: int, seq: int) -> int:
    """That the model asks for, forward and backward; `outputs` is the vocabulary or the classes."""
    attention = 2 * shape.hidden * shape.head_width * (shape.heads + shape.kv_heads)
    products = shape.layers * (attention + 3 * shape.hidden * shape.ffn) + outputs * shape.hidden
    # Scores and sums of attention are not halved for causality.
    return 6 * products + 12 * shape.layers * shape.heads * shape.head_width * seq


def hardware_flops_per_token(shape: ModelConfig, *, outputs: int, seq: int, recompute: str) -> int:
    """That are computed: with full recomputation the forward pass, a third of all, comes twice.

    Selective recomputation keeps the products and attention, and what it repeats has next to none.
    """
    asked = flops_per_token(shape, outputs=outputs, seq=seq)
    return asked * 4 // 3 if recompute == "full" else asked


class Meter:
    """Sums up the steps between two lines of the log. Every rank has one; rank 0's is shown."""

    def __init__(self, config: TrainConfig, *, outputs: int, world: int, device: torch.device, cursor: Cursor) -> None:
        self._config, self._world, self._device, self._cursor = config, world, device, cursor
        recompute = config.parallelism.recompute
        self._asked = flops_per_token(config.model, outputs=outputs, seq=config.seq)
        self._computed = hardware_flops_per_token(config.model, outputs=outputs, seq=config.seq, recompute=recompute)
        self.begin([])

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """Goes on from the rows of the log that are kept: time that led to no kept row is lost time."""
        self._useful_s = sum(row.get("useful_s", 0.0) for row in rows)
        self._first_at = rows[0]["at"] - rows[0]["useful_s"] if rows and "at" in rows[0] else time.time()
        self._steps, self._useful_now_s, self._wall_s, self._mark_s = 0, 0.0, 0.0, time.monotonic()
        self._waited_s = self._cursor.wait_s

    def stepped(self, seconds: float) -> None:
        """One step was made, in so many seconds."""
        self._steps += 1
        self._useful_now_s += seconds
        self._wall_s = time.monotonic() - self._mark_s  # read once: all that is said of a step is of one moment

    @property
    def tokens_per_s(self) -> float:
        """Over all ranks and all time since the last row, checkpoints included."""
        tokens = self._steps * self._config.global_batch * self._config.seq
        return tokens / self._wall_s

    def row(self) -> dict[str, float]:
        """What the steps since the last row took; begins the next."""
        now = time.time()
        tokens_per_s, waited_s = self.tokens_per_s, self._cursor.wait_s - self._waited_s
        self._useful_s += self._useful_now_s
        allocated, reserved = peak_memory_bytes(self._device)
        row = {
            "at": now,
            "useful_s": self._useful_now_s,
            "step_s": self._useful_now_s / self._steps,
            "tokens_per_s_per_rank": tokens_per_s / self._world,
            "data_wait_ratio": waited_s / self._wall_s,
            "memory_peak_bytes": allocated,
            "memory_reserved_peak_bytes": reserved,
            "goodput_ratio": min(self._useful_s / max(now - self._first_at, 1e-9), 1.0),
            **self._against_plan(tokens_per_s, self._useful_now_s / self._steps, allocated),
        }
        self._steps, self._useful_now_s, self._mark_s = 0, 0.0, time.monotonic()
        self._waited_s = self._cursor.wait_s
        return row

    def _against_plan(self, tokens_per_s: float, step_s: float, memory_bytes: float) -> dict[str, float]:
        plan, found = self._config.plan, {}
        if plan.peak_flops_per_rank is not None:
            per_flop = tokens_per_s / self._world / plan.peak_flops_per_rank
            found |= {"mfu_ratio": per_flop * self._asked, "hfu_ratio": per_flop * self._computed}
        if plan.step_s is not None:
            found["step_to_planned_ratio"] = step_s / plan.step_s
        if plan.memory_bytes is not None:
            found["memory_to_planned_ratio"] = memory_bytes / plan.memory_bytes
        return found


def peak_memory_bytes(device: torch.device) -> tuple[int, int]:
    """(allocated, reserved) at most so far: of the GPU's allocator, or for both the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return resident, resident
