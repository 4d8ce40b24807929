"""A LoRA adapter as PEFT writes it, read and held against the model that it is for. Knows no torch.

An adapter adds scale · B · A to a matrix of the model (arXiv 2106.09685), where scale is alpha / r, or alpha / √r with
`use_rslora` (arXiv 2312.03732). Whatever else an adapter may change, and this server would leave out, is refused.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from serving.errors import Refused
from serving.model.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))\.lora_(A|B)\.weight")
# What changes more than the products of A and B, and the value that says it does not.
PLAIN = {
    "use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "fan_in_fan_out": False,
    "layer_replication": None, "trainable_token_indices": None, "use_qalora": False, "alora_invocation_tokens": None,
}  # fmt: skip
CHANGED_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # ways to begin that leave the model's own weights changed
FIX = "Train it for this model, or merge it into a package of its own"


@dataclass(frozen=True)
class Target:
    """One matrix of the model that the adapter changes."""

    layer: int
    module: str  # q_proj, …
    key: str  # of its tensors, less `.lora_A.weight`
    rank: int
    scale: float


@dataclass(frozen=True)
class AdapterFile:
    path: Path
    digest: str  # of its two files
    targets: tuple[Target, ...]
    num_values: int


def shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Each matrix that an adapter can change → its (outputs, inputs)."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "q_proj": (q, config.hidden), "k_proj": (kv, config.hidden), "v_proj": (kv, config.hidden),
        "o_proj": (config.hidden, q), "gate_proj": (config.ffn, config.hidden), "up_proj": (config.ffn, config.hidden),
        "down_proj": (config.hidden, config.ffn),
    }  # fmt: skip


def read_adapter(root: Path, config: ModelConfig) -> AdapterFile:
    """The adapter at `root`. Raises `Refused` when it is none, is damaged, or does not fit a model of this shape."""
    about, digest = _read_config(root / CONFIG)
    path = root / WEIGHTS
    try:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        with safe_open(path, framework="np") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except OSError as error:
        what = f"the adapter's weights cannot be read: {error.strerror or error}"
        raise Refused(what, where=str(path), fix="Save the adapter again, as safetensors") from None
    except SafetensorError as error:
        raise Refused(f"the file is damaged: {error}", where=str(path), fix="Copy or save the adapter again") from None
    targets = [_target(key, found, about, config, where=str(path)) for key in found if ".lora_B." not in key]
    if not targets or len(found) != 2 * len(targets):
        raise Refused("the adapter's matrices do not come in pairs", where=str(path), fix="Save the adapter again")
    values = sum(rows * columns for rows, columns in found.values())
    return AdapterFile(path=path, digest=digest.hexdigest(), targets=tuple(targets), num_values=values)


def _read_config(path: Path) -> tuple[dict[str, Any], Any]:
    """The config, and the digest that its bytes begin."""
    try:
        raw = path.read_bytes()
        about = json.loads(raw)
        kind = about["peft_type"]
    except FileNotFoundError:
        raise Refused(f"{CONFIG} is missing", where=str(path), fix="Give an adapter in PEFT's layout") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise Refused("the adapter's config cannot be read", where=str(path), fix="Save the adapter again") from None
    if kind != "LORA":
        raise Refused(f"peft_type '{kind}' is not served", where=str(path), fix="Served is: LORA")
    for name, plain in PLAIN.items():
        if about.get(name, plain) not in (plain, None, []):
            raise Refused(f"'{name}' is not served", where=str(path), fix=FIX)
    begun = about.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(CHANGED_BASE):
        what = f"it began as '{begun}', which changes the model's own weights"
        raise Refused(what, where=str(path), fix="Save it with PEFT's path_initial_model_for_weight_conversion")
    return about, hashlib.sha256(raw)


def _target(
    key: str, found: dict[str, tuple[int, ...]], about: dict[str, Any], config: ModelConfig, *, where: str
) -> Target:
    match, known = KEY.fullmatch(key), shapes(config)
    if match is None or match[3] not in known:
        raise Refused(f"there is no place for '{key[:200]}'", where=where, fix=f"Served are: {', '.join(known)}")
    (outputs, inputs), layer = known[match[3]], int(match[2])
    rank = found[key][0] if found[key] else 0
    b_shape = found.get(key.replace(".lora_A.", ".lora_B."))
    if not rank or layer >= config.layers or found[key] != (rank, inputs) or b_shape != (outputs, rank):
        what = f"'{match[1]}' has matrices {found[key]} and {b_shape}; the model has {config.layers} layers, "
        raise Refused(what + f"and {match[3]} is {outputs} × {inputs}", where=where, fix=FIX)
    try:
        alpha = float(_by_pattern(about.get("alpha_pattern"), match[1], about["lora_alpha"]))
    except (KeyError, TypeError, ValueError):
        raise Refused("the adapter's config has no 'lora_alpha'", where=where, fix="Save the adapter again") from None
    scale = alpha / (rank**0.5 if about.get("use_rslora") else rank)
    return Target(layer, match[3], key.removesuffix(".lora_A.weight"), rank, scale)


def _by_pattern(patterns: dict[str, Any] | None, module: str, otherwise: Any) -> Any:
    """PEFT's rule: the first pattern that the end of the module's name matches."""
    return next((v for p, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({p})", module)), otherwise)
