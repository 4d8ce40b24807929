"""How much of the hardware the engine uses while it works: of its arithmetic (MFU) and of its memory's bandwidth.

Model FLOPs as in PaLM (arXiv 2204.02311, appendix B), forward only: 2 for each weight and token, and 4 · layers ·
heads · head size for each pair of a token and one that it looks at. Bytes: each step reads the layers' weights once,
the vocabulary's where it samples, and the keys and values that each sequence looks back on.
"""

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from serving.engine.scheduler import Scheduled
from serving.model.config import ModelConfig

WINDOW = 64  # steps
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}  # with a scale to 32 inputs


class Peaks(NamedTuple):
    bytes_per_s: float
    flops_per_s: float


class Cost(NamedTuple):
    seconds: float
    read_bytes: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a model costs by the step, the token and the position looked back on."""

    layer_weights: int
    head_weights: int
    layer_bytes: float
    head_bytes: float
    kv_bytes_per_token: int
    attention_flops: int  # of one token looking at one other

    @classmethod
    def of(cls, config: ModelConfig, *, form: str, dtype: torch.dtype) -> "Work":
        """`form` is that of the layers' weights, one of `WEIGHT_BYTES`; `dtype` that of the vocabulary's and the cache."""
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        layer = config.layers * (config.hidden * (2 * q + 2 * kv) + 3 * config.hidden * config.ffn)
        head = config.vocab_size * config.hidden
        return cls(
            layer_weights=layer, head_weights=head, layer_bytes=layer * WEIGHT_BYTES[form],
            head_bytes=head * (2 if form == "bfloat16" else dtype.itemsize), attention_flops=4 * config.layers * q,
            kv_bytes_per_token=config.kv_bytes_per_token(bytes_per_value=dtype.itemsize),
        )  # fmt: skip

    @property
    def look(self) -> float:
        """Looking at one position, in the arithmetic of a token's layers."""
        return self.attention_flops / (2 * self.layer_weights)

    def cost(self, batch: Seq[Scheduled], seconds: float) -> Cost:
        tokens = sampled = cached = looks = 0
        for item in batch:
            new, old = item.num_tokens, item.seq.num_computed
            tokens, cached = tokens + new, cached + old + new
            looks += new * (2 * old + new + 1) // 2  # a token looks at all before it and itself
            sampled += 1 + len(item.guess) if item.completes else 0
        read = self.layer_bytes + self.head_bytes * (sampled > 0) + cached * self.kv_bytes_per_token
        flops = 2 * (tokens * self.layer_weights + sampled * self.head_weights) + looks * self.attention_flops
        return Cost(seconds, read, flops)


class Usage:
    """Over the latest steps: what was used of the `peaks`, while there was work."""

    def __init__(self, work: Work, peaks: Peaks) -> None:
        self.work, self.peaks = work, peaks
        self._costs: deque[Cost] = deque(maxlen=WINDOW)

    def add(self, batch: Seq[Scheduled], seconds: float) -> None:
        """To be called before the batch's sequences move on."""
        self._costs.append(self.work.cost(batch, seconds))

    @property
    def ratios(self) -> tuple[float, float]:
        """(of bandwidth, of FLOPs); 0 before the first step."""
        seconds, read_bytes, flops = (
            (sum(values) for values in zip(*self._costs, strict=True)) if self._costs else (1, 0, 0)
        )
        return read_bytes / seconds / self.peaks.bytes_per_s, flops / seconds / self.peaks.flops_per_s


@cache
def measure_peaks(device: torch.device, *, ranks: int) -> Peaks:
    """What the hardware does when it does nothing else: the best of a few tries, a tenth of a second in all on a CPU.

    `ranks` of GPUs have that much each; on one machine's CPUs they share it.
    """
    side, numbers = (512, 16 << 20) if device.type == "cpu" else (8192, 1 << 30)
    compute, each = (torch.float32, 1) if device.type == "cpu" else (torch.bfloat16, ranks)
    with torch.inference_mode():
        many = torch.ones(numbers, dtype=torch.float32, device=device)
        square = torch.ones(side, side, dtype=compute, device=device)
        read_s = min(_seconds(lambda: many.sum(), device) for _ in range(4))
        multiply_s = min(_seconds(lambda: square @ square, device) for _ in range(4))
    return Peaks(each * many.nbytes / read_s, each * 2 * side**3 / multiply_s)


def _seconds(work, device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
