"""From a published measurement to the training run that it measured: layout, recomputation, numbers, batch.

What a point does not say is taken from its framework's defaults, and each such choice is returned in words.
"""

import re
from dataclasses import replace
from typing import Any, Literal, cast

from infra.planner.frameworks import Framework, framework_of
from infra.planner.points import Point, device_gib_of, number, shape_of, whole
from infra.planner.run import FP32, MEGATRON, PURE, Kernels, Layout, Loss, Recompute, Run, States, check_layout
from infra.planner.train_memory import CONTEXT_GIB, memory

OPTIMIZERS = (
    (r"8.?bit|bnb", 2.0),  # two moments of one byte (Dettmers et al. 2022)
    (r"adafactor", 0.0),  # rows and columns of the second moment (Shazeer and Stern 2018)
    (r"sgd(?!.*moment)", 0.0),
    (r"sgd|lion|muon", 4.0),  # one fp32 moment
)
"""Bytes of moments a parameter, where they are not AdamW's."""


def recompute_of(point: Point, framework: Framework) -> Recompute:
    text = str(point.raw.get("recompute") or "").lower().strip()
    if text.startswith("not") or not text:
        point.assumptions.append(f"recomputation not said: {framework.name}'s default, {framework.recompute}")
        return framework.recompute
    if text.startswith(("none", "no", "off", "false")):
        return "none"
    if "layer" in text and ("2nd" in text or "second" in text or "every" in text) and "full" not in text:
        return "every-2nd"
    if re.search(r"\bop\b|selective-op|per-op", text):
        return "matmul"
    if "selective" in text or "attention" in text or "core" in text:
        return "attention"
    if re.search(r"full|true|all|block|uniform|yes|\bon\b|enabled|checkpoint", text):
        return "full"
    raise ValueError(f"recompute {point.raw.get('recompute')!r} is not understood")


def _numbers_of(point: Point, framework: Framework) -> States:
    """Bytes of weight, gradient, master and AdamW's moments: what `dtype` says where it is explicit, else the framework's."""
    text = str(point.raw.get("dtype") or "").lower()
    if ("pure" in text and "fsdp" not in text) or re.search(r"(bf16|16)-true", text):
        return PURE
    if "fp32 master+grad" in text or text.startswith(("fp32", "amp")):
        return FP32
    if framework.name == "PyTorch" and ("bf16 params" in text or "fp16" in text):
        return MEGATRON
    return framework.states


def states_of(point: Point, framework: Framework) -> States:
    """Bytes of state a parameter, with the moments of the optimizer that the point names (AdamW where it names none)."""
    states, name = _numbers_of(point, framework), str(point.raw.get("optimizer") or "").lower()
    for pattern, moments in OPTIMIZERS:
        if re.search(pattern, name):
            return replace(states, moments=moments)
    return states


def kernels_of(point: Point, framework: Framework) -> Kernels:
    raw, text = point.raw, str(point.raw.get("dtype") or "").lower()
    kernels = framework.kernels
    if raw.get("compile") is not None:
        kernels = replace(kernels, fused=bool(raw["compile"]))
    if re.search(r"async[ -]?tp", point.text) and "vanilla" not in point.text:
        kernels = replace(kernels, tp_hidden=0.5)
    kernels = replace(kernels, loss=_loss_of(point, framework, kernels))
    return replace(kernels, fp8="float8" in text or "fp8" in text)


def _loss_of(point: Point, framework: Framework, kernels: Kernels) -> Loss:
    """How the loss is computed: as the point says, else as the framework does."""
    text = f"{point.raw.get('loss') or ''} {point.text}".lower()
    if re.search(r"chunked|liger|cut.?cross", text):
        return "chunked"
    if re.search(r"fused (linear )?cross|compiled loss|fused.?ce\b", text):
        return "compiled"
    # torchtitan compiles its loss with the model since 2025.
    if framework.name == "torchtitan" and kernels.fused and re.search(r"20(2[5-9])", text) and "eager" not in text:
        return "compiled"
    return kernels.loss


def _parallelism(point: Point) -> dict[str, Any]:
    """The point's sizes by dimension, out of a mapping or of words (`fsdp`, `tp8 pp2`, `dp=4, zero-3`)."""
    given: Any = point.raw.get("parallelism")
    if isinstance(given, dict):
        return cast("dict[str, Any]", given)
    if not isinstance(given, str):
        return {}
    words = given.lower()
    named = re.findall(r"(fsdp|ddp|dp|tp|pp|cp|ep|vpp)\W{0,3}(\d+)", words)
    sizes: dict[str, Any] = {name: int(size) for name, size in named}
    if stage := re.search(r"zero\D{0,8}([0-3])", words):
        sizes["zero_stage"] = int(stage[1])
    if not named and re.search("fsdp|full.?shard", words):
        sizes["fsdp"] = point.gpus
    return sizes


def _zero_stage(given: dict[str, Any]) -> int | None:
    """ZeRO's stage (`3`, `stage3`); None where it is not said. Raises ValueError for what is none."""
    value = next((given[key] for key in ("zero_stage", "zero") if given.get(key) is not None), None)
    if value is None:
        return None
    stage = re.search(r"\d+", str(value))
    if stage is None or int(stage[0]) > 3:
        raise ValueError(f"zero stage {value!r} is none of 0 to 3")
    return int(stage[0])


def layout_of(point: Point, framework: Framework) -> Layout:
    given = _parallelism(point)

    def size(*keys: str) -> int:
        return next((whole(given, key) for key in keys if given.get(key) is not None), 1)

    layout = Layout(
        dp=size("dp", "ddp", "dp_replicate"),
        fsdp=size("fsdp", "dp_shard"),
        tp=size("tp"),
        pp=size("pp"),
        cp=size("cp"),
        vpp=size("vpp", "virtual_pp"),
        ep=size("ep"),
    )
    if layout.gpus != point.gpus:
        if point.gpus % layout.gpus:
            raise ValueError(f"parallelism makes {layout.gpus} GPUs, and the point has {point.gpus}")
        times = point.gpus // layout.gpus
        point.assumptions.append(f"parallelism names {layout.gpus} of {point.gpus} GPUs: the rest taken as replicas")
        layout = replace(layout, dp=layout.dp * times)
    if (
        layout.pp > 1
        and layout.vpp == 1
        and "interleav" in point.text
        and not any(k in given for k in ("vpp", "virtual_pp"))
    ):
        point.assumptions.append("interleaved, and not in how many chunks: 2 a stage")
        layout = replace(layout, vpp=2)
    stage = _zero_stage(given)
    zero = (3 if layout.fsdp > 1 else framework.zero) if stage is None else stage
    if layout.fsdp > 1 and zero in (0, 1) and stage is not None:
        layout = replace(layout, dp=layout.dp * layout.fsdp, fsdp=1)
    if zero == 3 and layout.fsdp == 1 and stage is not None:
        layout = replace(layout, dp=1, fsdp=layout.dp)
    sequence_parallel = given.get("sequence_parallel", given.get("sp"))
    return replace(
        layout,
        zero=cast("Literal[0, 1, 2, 3]", zero),
        sequence_parallel=framework.sequence_parallel if sequence_parallel is None else bool(sequence_parallel),
    )


def framework_for(point: Point) -> Framework:
    return framework_of(point.text, zero=_zero_stage(_parallelism(point)))


def run_of(point: Point) -> Run:
    """The training run that the point measured. Raises ValueError for what is missing or contradicts itself."""
    raw, framework, shape = point.raw, framework_for(point), shape_of(point)
    if not raw.get("seq"):
        raise ValueError("no sequence length")
    layout = layout_of(point, framework)
    check_layout(shape, layout)
    run = Run(
        shape=shape,
        seq=whole(raw, "seq"),
        micro_batch=whole(raw, "micro_batch", default=1),
        micro_batches=1,
        layout=layout,
        recompute=recompute_of(point, framework),
        states=states_of(point, framework),
        reduce_bytes=_reduce_bytes(point, framework),
        kernels=kernels_of(point, framework),
        trained=trained_of(point),
    )
    local = whole(raw, "global_batch") / layout.batch_ranks if raw.get("global_batch") is not None else 0
    if not local:
        accumulation = whole(raw, "grad_accum", default=1)
        point.assumptions.append(f"global batch not said: {accumulation} micro-batches a step")
        return replace(run, micro_batches=accumulation)
    if not raw.get("micro_batch"):
        run = replace(run, micro_batch=_likely_micro_batch(run, local=local, point=point, framework=framework))
    count = local / run.micro_batch
    if count < 1 or count != int(count):
        point.assumptions.append(f"global batch makes {count:.3g} micro-batches: rounded")
    return replace(run, micro_batches=max(round(count), 1))


def trained_of(point: Point) -> int | None:
    """Parameters that are trained where not all are (LoRA). Raises ValueError where the point says LoRA and not how many."""
    raw = point.raw
    given = next(
        (raw[key] for key in ("trainable_params", "trainable_parameters", "lora_params") if raw.get(key)), None
    )
    if given is not None:
        return int(number(given, default=0))
    if re.search("lora|adapter", f"{raw.get('method') or ''} {raw.get('recipe') or ''}".lower()):
        raise ValueError("LoRA, and the number of trained parameters is not there (trainable_params)")
    return None


def _reduce_bytes(point: Point, framework: Framework) -> int:
    """Bytes of a gradient on the wire: PyTorch's FSDP and DDP hooks reduce in the compute type unless fp32 is asked for."""
    text = str(point.raw.get("dtype") or "").lower()
    if "pure" in text or (framework.name == "PyTorch" and "fp32" not in text and re.search("bf16|fp16", text)):
        return 2
    return framework.reduce_bytes


def _likely_micro_batch(run: Run, *, local: float, point: Point, framework: Framework) -> int:
    """Where a source does not say: torchtitan cuts its batch into pp micro-batches, other pipelines into single sequences;
    without a pipeline the largest power of two that divides the batch and fits."""
    if run.layout.pp > 1:
        chosen = max(int(local // run.layout.pp), 1) if framework.name == "torchtitan" else 1
    else:
        chosen, device = 1, device_gib_of(point) - CONTEXT_GIB
        while local % (2 * chosen) == 0 and memory(replace(run, micro_batch=2 * chosen)).value < device:
            chosen *= 2
    point.assumptions.append(f"micro-batch not said: {chosen}")
    return chosen
