"""From a published measurement, as its source wrote it down, to what the planner estimates. All names and free text are read here.

What a point does not say is taken from its framework's defaults, and each such choice is returned in words; what cannot be known
(the GPU, the shape) raises ValueError.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from infra.catalog import Gpu, gpus
from infra.planner.serve_memory import FORMATS, Format
from infra.planner.shape import Experts, Latent, Shape

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
    if not isinstance(cast(Any, raw), dict):
        raise ValueError(f"no JSON object, and it is {raw!r}")
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
        gpus=whole(raw, "gpus", default=1),
    )


def number(value: Any, *, default: float) -> float:
    """`value` as a number; `default` where there is none. Raises ValueError for what is no number."""
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def whole(raw: Raw, key: str, *, default: int | None = None) -> int:
    """A count of at least one. Raises ValueError for what is none, and for what is not there when there is no `default`."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    found = number(value, default=0)
    if not 1 <= found <= 2**50 or found != int(found):
        raise ValueError(f"{key} {value!r} is no count of one or more")
    return int(found)


PCIE_GBPS = 32.0
"""One way of 16 lanes of PCIe 4."""

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
    (r"\bl40\b", "L40"),
    (r"\bl4\b", "L4"),
    (r"6000.{0,4}ada", "RTX6000-Ada"),
    (r"\ba40\b", "A40"),
    (r"\ba30\b", "A30"),
    (r"3090", "RTX3090"),
    (r"5090", "RTX5090"),
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
    if "pairwise" in text and point.gpus > 2:
        found = replace(found, intra_gbps=PCIE_GBPS)  # a ring over more than a pair goes over PCIe
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
    hidden, heads = whole(raw, "hidden"), whole(raw, "heads")
    shape = Shape(
        layers=whole(raw, "layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=whole(raw, "kv_heads", default=heads),
        head_dim=whole(raw, "head_dim", default=max(hidden // heads, 1)),
        ffn=whole(raw, "ffn"),
        vocab=whole(raw, "vocab"),
        gated=bool(raw.get("gated_mlp", True)),
        tied=bool(raw.get("tied_embeddings") or False),
        experts=_experts_of(raw),
        latent=_latent_of(raw),
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


def _experts_of(raw: Raw) -> Experts | None:
    """The mixture of experts that a point gives, by the names of config.json or short ones. Raises ValueError for half of one."""
    count = number(raw.get("experts") or raw.get("num_experts") or raw.get("n_routed_experts"), default=1)
    if count <= 1:
        return None
    active = number(raw.get("active_experts") or raw.get("top_k") or raw.get("num_experts_per_tok"), default=0)
    if not 0 < active <= count:
        raise ValueError(f"{count:.0f} experts, and to how many a token goes is not there (active_experts)")
    width = whole(raw, "moe_ffn" if raw.get("moe_ffn") else "ffn")
    shared = number(raw.get("shared_experts") or raw.get("n_shared_experts"), default=0) * width
    return Experts(
        count=int(count),
        active=int(active),
        ffn=width,
        shared_ffn=int(number(raw.get("shared_ffn"), default=shared)),
        dense_layers=int(number(raw.get("dense_layers") or raw.get("first_k_dense_replace"), default=0)),
    )


def _latent_of(raw: Raw) -> Latent | None:
    if not raw.get("kv_lora_rank"):
        return None
    return Latent(
        rank=whole(raw, "kv_lora_rank"),
        rope=whole(raw, "qk_rope_head_dim"),
        key=whole(raw, "qk_nope_head_dim"),
        value=whole(raw, "v_head_dim"),
        query_rank=int(number(raw.get("q_lora_rank"), default=0)),
    )


def weight_format_of(point: Point) -> Format:
    """How weights are stored: what `dtype` says, less what it says of the cache alone (`bf16, fp8 kv`)."""
    text = str(point.raw.get("dtype") or "").lower()
    text = re.sub(r"(fp8|int8)[^,;+/]*\bkv\w*|kv[^,;+/]*(fp8|int8)", "", text)
    for pattern, name in (
        ("int4|awq|gptq|w4|4-?bit|nf4", "int4"),
        ("fp8|float8", "fp8"),
        ("int8|w8a|8-?bit", "int8"),
        ("fp32|float32", "fp32"),
        ("bf16|fp16|bfloat16|float16|half", "bf16"),
    ):
        if re.search(pattern, text):
            return FORMATS[name]
    raise ValueError(f"dtype {point.raw.get('dtype')!r} is not understood")


def kv_bytes_of(point: Point) -> float:
    """Bytes of a cached value."""
    text = str(point.raw.get("dtype") or "").lower()
    return 1 if re.search(r"(fp8|int8)[^,;]*\bkv|kv[^,;]*(fp8|int8)", text) else 2
