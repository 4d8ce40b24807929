"""A model's shape, read from a Hugging Face `config.json`. Anything that would change the numbers is read or refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import Refused

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MOST, MOST_LAYERS = 1 << 24, 1 << 12  # a damaged config is told as such, and takes no time and memory first


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency scaling: wavelengths beyond the old context are stretched by `factor`, smoothly."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    family: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int  # tokens; no longer than the sliding window, within which attention is plain causal attention
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str

    def kv_bytes_per_token(self, *, bytes_per_value: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value

    @classmethod
    def read(cls, path: Path) -> "ModelConfig":
        """Reads `path`. Raises `Refused` for a file that is no config, or a model of another family or kind."""
        try:
            raw = json.loads(path.read_bytes())
            return _from_json(raw, where=str(path))
        except FileNotFoundError:
            raise Refused(
                "config.json is missing", where=str(path), fix="Give a package in Hugging Face layout"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            if isinstance(error, Refused):
                raise
            what = f"the config cannot be read: {type(error).__name__} {error}"
            raise Refused(what, where=str(path), fix="Export the model again") from None


def _from_json(raw: dict[str, Any], *, where: str) -> ModelConfig:
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise Refused(f"model_type '{family}' is not served", where=where, fix=f"Served are: {', '.join(FAMILIES)}")
    if raw.get("hidden_act", "silu") != "silu" or raw.get("quantization_config"):
        what = "only silu activations and unquantised weights are served"
        raise Refused(what, where=where, fix="Export the model in float32 or bfloat16")
    hidden, heads = _size(raw["hidden_size"]), _size(raw["num_attention_heads"])
    kv_heads = _size(raw.get("num_key_value_heads") or heads)
    # Qwen3's own default is a number; the others' follows from the heads.
    head_dim = _size(raw.get("head_dim") or (128 if family == "qwen3" else hidden // heads))
    if heads % kv_heads:
        raise Refused(
            f"{heads} heads cannot share {kv_heads} key-value heads", where=where, fix="Export the model again"
        )
    if head_dim % 2:
        raise Refused(f"{head_dim} values of a head cannot be rotated", where=where, fix="Export the model again")
    said = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    if any(isinstance(value, dict) for value in said.values()):
        what = "positions that differ by the kind of layer are not served"
        raise Refused(what, where=where, fix="Serve a model whose layers are of one kind")
    rope = {**raw, **said}
    positions = _size(raw["max_position_embeddings"])
    window = raw.get("sliding_window")
    if window and (family == "mistral" or raw.get("use_sliding_window")):
        positions = min(positions, _size(window))
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        family=family,
        vocab_size=_size(raw["vocab_size"]),
        hidden=hidden,
        layers=_size(raw["num_hidden_layers"], most=MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=_size(raw["intermediate_size"]),
        norm_eps=_number(raw["rms_norm_eps"]),
        rope_theta=_number(rope.get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(rope, where=where),
        max_positions=positions,
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


def _rope_scaling(rope: dict[str, Any], *, where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise Refused(f"rope_type '{kind}' is not served", where=where, fix="Served are: default, llama3")
    return RopeScaling(
        factor=_number(rope["factor"]),
        low_freq_factor=_number(rope["low_freq_factor"]),
        high_freq_factor=_number(rope["high_freq_factor"]),
        original_max_positions=_size(rope["original_max_position_embeddings"]),
    )


def _size(value: Any, *, most: int = MOST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ValueError(f"{value!r} is no size")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is no number above 0")
    return float(value)
