"""A model's shape, read from a Hugging Face `config.json`. Anything that would change the numbers is read or refused."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import Refused

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MOST, MOST_LAYERS = 1 << 24, 1 << 12  # a damaged config is told as such, and takes no time and memory first


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How turns are slowed down for a context `factor` times as long as the first one (rope.py)."""

    kind: str  # linear, llama3, yarn
    factor: float
    original_max_positions: int = 0
    low_turns: float = 0.0  # over the first context: what makes fewer is slowed down whole, …
    high_turns: float = 0.0  # … and what makes more is left alone
    whole_pairs: bool = True
    attention_factor: float = 1.0  # of queries and keys


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
    scaling, positions = _rope_scaling(rope, where=where), _size(raw["max_position_embeddings"])
    if scaling is not None and scaling.kind == "yarn":  # often added to a config that still says the first context
        positions = max(positions, _size(int(scaling.original_max_positions * scaling.factor)))
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
        rope_scaling=scaling,
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
    if kind not in ("linear", "llama3", "yarn"):
        fix = "Served are: default, linear, llama3, yarn"
        raise Refused(f"rope_type '{kind}' is not served", where=where, fix=fix)
    factor = _number(rope["factor"])
    if kind == "linear":
        return RopeScaling(kind=kind, factor=factor)
    first = _size(rope.get("original_max_position_embeddings") or rope["max_position_embeddings"])
    if kind == "llama3":
        low, high = _number(rope["low_freq_factor"]), _number(rope["high_freq_factor"])
        return RopeScaling(kind=kind, factor=factor, original_max_positions=first, low_turns=low, high_turns=high)
    if _number(rope.get("rope_theta", 10_000.0)) <= 1:
        raise ValueError("yarn needs a rope_theta above 1")
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_max_positions=first,
        low_turns=_number(rope.get("beta_slow") or 1.0),
        high_turns=_number(rope.get("beta_fast") or 32.0),
        whole_pairs=bool(rope.get("truncate", True)),
        attention_factor=_attention_factor(rope, factor),
    )


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    """YaRN's, by its eq. 22 unless the config says one, or the two scales of DeepSeek's models."""

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return _number(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(_number(rope["mscale"])) / scale(_number(rope["mscale_all_dim"]))
    return scale(1.0)


def _size(value: Any, *, most: int = MOST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ValueError(f"{value!r} is no size")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is no number above 0")
    return float(value)
