"""How known training programs keep numbers and run a step: facts of their code, by the name that a source bears.

Used for published measurements (`slipway estimate`), whose fields say what was run and seldom how.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from infra.planner.run import DEEPSPEED, FP32, MEGATRON, NANOTRON, Kernels, Recompute, States


@dataclass(frozen=True, kw_only=True)
class Framework:
    name: str
    states: States
    kernels: Kernels
    reduce_bytes: int = 4
    zero: Literal[0, 1, 2, 3] = 0
    """Sharding among replicas where a source does not say."""
    reports: Literal["first", "fullest"] = "fullest"
    """The pipeline stage whose memory its log shows."""
    recompute: Recompute = "none"
    """Its default, where a source does not say."""
    flops: Literal["all", "matmul"] = "matmul"
    """Parameters that its MFU counts: all, or all but the input embedding."""
    decimal: bool = False
    """Its GB are 10^9 bytes; what torch's own tools and most logs call GB is 2^30."""
    fp8_peak: bool = False
    """Its MFU of a run in fp8 is of the fp8 peak."""
    sequence_parallel: bool = True


PYTORCH = Framework(name="PyTorch", states=FP32, kernels=Kernels(fused=False, wide_norms=True))

KNOWN: tuple[tuple[str, Framework], ...] = (
    ("torchtitan", Framework(name="torchtitan", states=FP32, kernels=Kernels(fused=False), zero=3, flops="all")),
    (
        "nanotron",
        Framework(
            name="nanotron",
            states=NANOTRON,
            kernels=Kernels(fused=False, split_by_cost=True, accumulates_wide=True),
            reports="first",
            flops="all",
        ),
    ),
    (
        "llm-foundry|mosaicml|composer",
        Framework(
            name="llm-foundry",
            states=FP32,
            kernels=Kernels(attention="flash1", loss="compiled"),
            flops="all",
            fp8_peak=True,
        ),
    ),
    (
        "lit-?gpt|lit-llama",
        Framework(name="LitGPT", states=FP32, kernels=Kernels(fused=False, wide_norms=True), decimal=True),
    ),
    (
        "deepspeed",
        Framework(
            name="DeepSpeed",
            states=DEEPSPEED,
            kernels=Kernels(flash=False, overlap_dp=False, collectives_per_block=12),
            reduce_bytes=2,
            flops="all",
        ),
    ),
    (
        r"megatron|nemo|mcore|transformer.?engine|2104\.04473|2205\.05198",
        Framework(
            name="Megatron",
            states=MEGATRON,
            kernels=Kernels(regather=True, tp_hidden=0.75, overlap_gather=True, attention="flash3"),
            zero=1,
            reports="first",
            recompute="attention",
        ),
    ),
    (
        "gpt-neox|bloom|2204\\.06745",
        Framework(name="Megatron-DeepSpeed", states=MEGATRON, kernels=Kernels(flash=False), zero=1),
    ),
)

FLASH_SINCE = 2206
"""Year and month of FlashAttention (arXiv 2205.14135): what was published before kept its scores."""


def framework_of(source: str, *, zero: int | None) -> Framework:
    """The framework that `source` names, as it was when that was written; plain PyTorch where none is named."""
    text = source.lower()
    found = next((framework for pattern, framework in KNOWN if re.search(pattern, text)), PYTORCH)
    paper = re.search(r"arxiv:?\s*(\d{4})\.\d{4,5}", text)
    if paper and int(paper[1]) < FLASH_SINCE:
        if zero == 3:
            found = {framework.name: framework for _, framework in KNOWN}["DeepSpeed"]
        early = int(paper[1]) < 2205  # sequence parallelism came with 2205.05198
        found = replace(
            found,
            kernels=replace(found.kernels, flash=False, tp_hidden=0.0),
            zero=0,
            sequence_parallel=not early,
        )
    return found
