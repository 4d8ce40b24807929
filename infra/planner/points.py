"""From a published measurement, as its source wrote it down, to what the planner estimates. All names and free text are read here.

What a point does not say is taken from its framework's defaults, and each such choice is returned in words; what cannot be known
(the GPU, the shape) raises ValueError.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from infra.catalog import Gpu, gpus
from infra.planner.frameworks import Framework, framework_of
from infra.planner.run import FP32, MEGATRON, PURE, Kernels, Layout, Loss, Recompute, Run, States
from infra.planner.serve_memory import FORMATS, Format
from infra.planner.shape import Shape
from infra.planner.train_memory import CONTEXT_GIB, memory

Raw = Mapping[str, Any]

SHAPE_KEYS = ("layers", "hidden", "heads", "ffn", "vocab")


@dataclass(frozen=True, kw_only=True)
class Point:
    id: str
    category: str
    text: str
    """Source and notes, lower case."""
    measured: dict[str, Any]
    raw: dict[str, Any]
    gpus: int
    assumptions: list[str] = field(default_factory=list[str])

    @property
    def trains(self) -> bool:
        """A point of a training run; else of inference."""
        if "infer" in self.category or "serv" in self.category or "decode" in self.category:
            return False
        return "train" in self.category or bool(self.raw.get("recompute"))


def read_point(raw: Raw) -> Point:
    """Check what every point has. Raises ValueError."""
    measured = raw.get("measured")
    if not isinstance(measured, dict) or not measured:
        raise ValueError("no `measured` values")
    notes = " ".join(str(raw.get(key) or "") for key in ("source", "notes"))
    return Point(
        id=str(raw.get("id", "?")),
        category=str(raw.get("category", "unknown")),
        text=notes.lower(),
        measured=cast("dict[str, Any]", measured),
        raw=dict(raw),
        gpus=int(number(raw.get("gpus"), default=1)),
    )


def number(value: Any, *, default: float) -> float:
    """`value` as a number; `default` where there is none. Raises ValueError for what is no number."""
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number")
    return float(value)


# Names of GPUs in free text, most special first.
GPU_NAMES = (
    (r"gb?300|b300", "B300"),
    (r"gb200|b200", "B200"),
    (r"gh200", "GH200"),
    (r"h200", "H200"),
    (r"h800", "H800"),
    (r"h20\b", "H20"),
    (r"h100.{0,12}nvl", "H100-NVL"),
    (r"h100.{0,12}pcie", "H100-PCIe"),
    (r"h100", "H100"),
    (r"a100.{0,24}40\s?g", "A100-40"),
    (r"a100.{0,16}pcie", "A100-80-PCIe"),
    (r"a100|a800", "A100-80"),
    (r"v100.{0,16}16\s?g", "V100-16"),
    (r"v100", "V100-32"),
    (r"mi-?325", "MI325X"),
    (r"mi-?300", "MI300X"),
    (r"mi-?250", "MI250X"),
    (r"l40s", "L40S"),
    (r"\bl4\b", "L4"),
    (r"a10g", "A10G"),
    (r"\ba10\b", "A10"),
    (r"a6000", "A6000"),
    (r"4090", "RTX4090"),
    (r"\bt4\b", "T4"),
)


def gpu_of(point: Point) -> Gpu:
    """The GPU that the text names, with the memory, bandwidth, power and network that the text gives. Raises ValueError."""
    text = str(point.raw.get("gpu") or "").lower()
    name = next((known for pattern, known in GPU_NAMES if re.search(pattern, text)), None)
    if name is None:
        raise ValueError(f"GPU {point.raw.get('gpu')!r} is not in the catalogue")
    found = gpus()[name]
    if "gcd" in text and name == "MI250X":
        # Programs see each of its two dies as a GPU.
        found = replace(
            found,
            tflops_bf16=found.tflops_bf16 / 2,
            bandwidth_gbps=found.bandwidth_gbps / 2,
            memory_gb=found.memory_gb / 2,
            memory_gib=found.memory_gib / 2,
        )
    if given := re.search(r"([\d.]+)\s*tb/s", text):
        found = replace(found, bandwidth_gbps=float(given[1]) * 1000)
    elif "hbm2e" in text and name == "H100":
        found = replace(found, bandwidth_gbps=2400.0)
    if given := re.search(r"(\d{3,4})\s*w\b", text):
        found = replace(found, tdp_w=float(given[1]))
    elif "low-tdp" in text or "lower-tdp" in text:
        found = replace(found, tdp_w=500.0)
    if given := re.search(r"(\d{2,3})\s*gb(?!/|it|ps)", text):
        nominal = float(given[1])
        if abs(nominal - found.memory_gb) > 2:
            found = replace(found, memory_gb=nominal, memory_gib=found.memory_gib * nominal / found.memory_gb)
    if given := re.search(r"([\d.]+)\s*gib", text):
        found = replace(found, memory_gib=float(given[1]))
    both = text + " " + point.text
    if given := re.search(r"(\d+)\s*gb(?:ps|/s|it/s)\s*rdma per gpu", both):
        found = replace(found, nic_gbps=float(given[1]) / 8)
    elif given := re.search(r"(\d{3,4})\s*gbps\s*node", both):
        found = replace(found, nic_gbps=float(given[1]) / 8 / 8)
    return found


def device_gib_of(point: Point) -> float:
    """Memory of one GPU that programs see, GiB; the text's own figure serves where the GPU is unknown. Raises ValueError."""
    if given := re.search(r"([\d.]+)\s*gib", str(point.raw.get("gpu") or "").lower()):
        return float(given[1])
    return gpu_of(point).memory_gib


def shape_of(point: Point) -> Shape:
    """The model's shape. Raises ValueError that names the fields which are not there."""
    raw = point.raw
    if gone := [key for key in SHAPE_KEYS if not raw.get(key)]:
        raise ValueError(f"the shape is not known: no {', '.join(gone)}")
    if number(raw.get("experts") or raw.get("num_experts"), default=1) > 1:
        raise ValueError("a mixture of experts; the planner knows dense decoders")
    hidden, heads = int(raw["hidden"]), int(raw["heads"])
    shape = Shape(
        layers=int(raw["layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(raw.get("kv_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        ffn=int(raw["ffn"]),
        vocab=int(raw["vocab"]),
        gated=bool(raw.get("gated_mlp", True)),
        tied=bool(raw.get("tied_embeddings") or False),
    )
    published = number(raw.get("params"), default=0)
    if raw.get("tied_embeddings") is None and published:
        # Not said: whichever of the two is nearer to the published count.
        tied = replace(shape, tied=True)
        if abs(tied.parameters - published) < abs(shape.parameters - published):
            shape = tied
        point.assumptions.append(
            f"embeddings {'tied' if shape.tied else 'not tied'}: nearer to the published parameters"
        )
    if published:
        shape = replace(
            shape, other=int(published - shape.parameters) if abs(published / shape.parameters - 1) < 0.02 else 0
        )
    return shape


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
    if "full" in text or "true" in text or "all" in text:
        return "full"
    raise ValueError(f"recompute {point.raw.get('recompute')!r} is not understood")


def states_of(point: Point, framework: Framework) -> States:
    """Bytes of state a parameter: what `dtype` says where it is explicit, else the framework's."""
    text = str(point.raw.get("dtype") or "").lower()
    if ("pure" in text and "fsdp" not in text) or re.search(r"(bf16|16)-true", text):
        return PURE
    if "fp32 master+grad" in text or text.startswith(("fp32", "amp")):
        return FP32
    if framework.name == "PyTorch" and ("bf16 params" in text or "fp16" in text):
        return MEGATRON
    return framework.states


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


def layout_of(point: Point, framework: Framework) -> Layout:
    given = cast("dict[str, Any]", point.raw.get("parallelism") or {})

    def size(*keys: str) -> int:
        return int(next((number(given[key], default=1) for key in keys if given.get(key) is not None), 1))

    if size("ep") > 1:
        raise ValueError("expert parallelism; the planner knows dense decoders")
    layout = Layout(
        dp=size("dp", "ddp", "dp_replicate"),
        fsdp=size("fsdp", "dp_shard"),
        tp=size("tp"),
        pp=size("pp"),
        cp=size("cp"),
        vpp=size("vpp", "virtual_pp"),
    )
    if layout.gpus != point.gpus:
        if point.gpus % layout.gpus:
            raise ValueError(f"parallelism makes {layout.gpus} GPUs, and the point has {point.gpus}")
        times = point.gpus // layout.gpus
        point.assumptions.append(f"parallelism names {layout.gpus} of {point.gpus} GPUs: the rest taken as replicas")
        layout = replace(layout, dp=layout.dp * times)
    stage = given.get("zero_stage", given.get("zero"))
    zero = (3 if layout.fsdp > 1 else framework.zero) if stage is None else int(number(stage, default=0))
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
    stage = cast("dict[str, Any]", point.raw.get("parallelism") or {}).get("zero_stage")
    return framework_of(point.text, zero=None if stage is None else int(stage))


def run_of(point: Point) -> Run:
    """The training run that the point measured. Raises ValueError for what is missing or contradicts itself."""
    raw, framework, shape = point.raw, framework_for(point), shape_of(point)
    if not raw.get("seq"):
        raise ValueError("no sequence length")
    layout = layout_of(point, framework)
    run = Run(
        shape=shape,
        seq=int(raw["seq"]),
        micro_batch=int(number(raw.get("micro_batch"), default=1)),
        micro_batches=1,
        layout=layout,
        recompute=recompute_of(point, framework),
        states=states_of(point, framework),
        reduce_bytes=_reduce_bytes(point, framework),
        kernels=kernels_of(point, framework),
        trained=trained_of(point),
    )
    local = number(raw.get("global_batch"), default=0) / layout.batch_ranks
    if not local:
        accumulation = int(number(raw.get("grad_accum"), default=1))
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


def weight_format_of(point: Point) -> Format:
    text = str(point.raw.get("dtype") or "").lower()
    for pattern, name in (
        ("int4|awq|gptq|w4|4-?bit|nf4", "int4"),
        ("int8|w8a|8-?bit", "int8"),
        ("fp8|float8", "fp8"),
        ("fp32", "fp32"),
    ):
        if re.search(pattern, text):
            return FORMATS[name]
    if re.search("bf16|fp16|float16|half", text):
        return FORMATS["bf16"]
    raise ValueError(f"dtype {point.raw.get('dtype')!r} is not understood")


def kv_bytes_of(point: Point) -> float:
    """Bytes of a cached value."""
    text = str(point.raw.get("dtype") or "").lower()
    return 1 if re.search(r"(fp8|int8)[^,;]*\bkv|kv[^,;]*(fp8|int8)", text) else 2
