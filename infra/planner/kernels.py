"""How fast a GPU runs the kernels of a transformer: matrix products, attention, element-wise chains.

A matrix product of m×k by k×n takes its FLOPs at the rate that power and scheduling leave, plus its memory traffic, which
tiles overlap only in part: time = 2mnk/(peak·η) + 2(mn + mk + nk)/bandwidth, or efficiency η/(1 + η·B·(1/m + 1/n + 1/k)) with the
machine balance B = peak/bandwidth. So small and narrow products are slow by physics, and one constant is left for each architecture.
"""

from infra.catalog import Gpu

GEMM_SHARE = {
    "volta": 0.75,
    "turing": 0.55,
    "ampere": 0.80,
    "ada": 0.70,
    "hopper": 0.64,
    "blackwell": 0.64,
    "cdna2": 0.55,
    "cdna3": 0.50,
}
"""Share of the data sheet's peak that large bf16 products sustain in training. A100 holds its clock (cuBLAS 8192³: 260 to 275 of
312); Hopper is held back by board power (600 to 720 of 989); CDNA by its libraries."""

FP8_SHARE = 0.58
"""Share of the fp8 peak that linear layers sustain, with casts and scaling (about 1.5 × bf16 end to end)."""

ATTENTION_SHARE: dict[str, dict[str, float]] = {
    "flash1": {"volta": 0.20, "ampere": 0.30, "hopper": 0.17},
    "flash2": {
        "volta": 0.25,
        "turing": 0.25,
        "ampere": 0.55,
        "ada": 0.45,
        "hopper": 0.34,
        "blackwell": 0.30,
        "cdna2": 0.30,
    },
    "flash3": {"hopper": 0.55, "blackwell": 0.50},
}
"""Share of peak that causal flash attention sustains over forward and backward, by generation of the kernel. flash1 (and Triton's):
25 to 40 % on A100 (Dao 2023, sec. 1), the same kernels on H100; flash2: 175 to 190 of 312 on A100, 335 of 989 on H100 (ibid., fig. 4,
6); flash3 and cuDNN's: 500 to 600 of 989 (Shah et al. 2024, fig. 5 and 6). A GPU without an entry has the generation before's."""

MEMORY_SHARE = 0.85
"""Share of memory bandwidth that element-wise kernels reach."""

COOL_W = {"hopper": 700.0, "ampere": 400.0}
"""Board power at which the shares above were taken."""


def power_share(gpu: Gpu) -> float:
    """Clock that a lower power cap leaves: dynamic power goes with the cube of frequency and voltage together."""
    reference = COOL_W.get(gpu.architecture)
    return 1.0 if reference is None or gpu.tdp_w >= reference else (gpu.tdp_w / reference) ** (1 / 3)


def product_tflops(gpu: Gpu, *, fp8: bool) -> float:
    """TFLOP/s that large matrix products sustain; in bf16 where the GPU has no fp8."""
    if fp8 and gpu.tflops_fp8:
        return gpu.tflops_fp8 * FP8_SHARE * power_share(gpu)
    return gpu.tflops_bf16 * GEMM_SHARE.get(gpu.architecture, 0.6) * power_share(gpu)


def gemm_s(*, m: float, n: float, k: float, gpu: Gpu, fp8: bool = False) -> float:
    """Seconds for an m×k by k×n product."""
    traffic = 2 * (m * n + m * k + n * k)
    return 2 * m * n * k / (product_tflops(gpu, fp8=fp8) * 1e12) + traffic / (gpu.bandwidth_gbps * 1e9)


def attention_s(*, flops: float, gpu: Gpu, generation: str = "flash2") -> float:
    """Seconds for `flops` of causal flash attention (the half of the scores that is computed)."""
    share = ATTENTION_SHARE[generation].get(gpu.architecture) or ATTENTION_SHARE["flash2"].get(gpu.architecture, 0.30)
    return flops / (gpu.tflops_bf16 * share * power_share(gpu) * 1e12)


def stream_s(*, moved_bytes: float, gpu: Gpu) -> float:
    """Seconds to read and write `moved_bytes` in kernels that do little else."""
    return moved_bytes / (gpu.bandwidth_gbps * 1e9 * MEMORY_SHARE)
