"""The shape of a model in `config.json` of Hugging Face, for the families that the trainer computes. Without torch."""

import typing
from pathlib import Path
from typing import Any

from trainer.config import Family
from trainer.errors import Refused
from trainer.files import digest_of, read_json, sha256_of_file

FAMILIES: tuple[str, ...] = typing.get_args(Family)
ADAPTERS_CONFIG, ADAPTERS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT names them
FIX = "Name a package that Transformers opens as Llama, Mistral, Qwen2 or Qwen3."


def read_settings(directory: Path) -> dict[str, Any]:
    """`config.json`. Raises Refused where there is none, or one of another family."""
    settings = read_json(directory / "config.json")
    if settings is None:
        raise Refused("there is no model package", where=str(directory), fix="Name the model/ of a finished run.")
    found = settings.get("model_type", "unknown")
    if found not in FAMILIES:
        raise Refused(f"the model is of type '{found}', not {', '.join(FAMILIES)}", where=str(directory), fix=FIX)
    if not isinstance(settings.get("vocab_size"), int):
        raise Refused("config.json has no vocab_size", where=str(directory), fix=FIX)
    return settings


def shape_of(settings: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The values of ModelConfig that `config.json` says. Raises Refused for what this model does not compute."""
    try:
        return _shape(settings, where=where)
    except KeyError as missing:
        raise Refused(f"config.json has no {missing.args[0]}", where=where, fix=FIX) from None
    except (AttributeError, TypeError) as error:
        raise Refused(f"config.json cannot be read: {error}", where=where, fix=FIX) from None


def _shape(settings: dict[str, Any], *, where: str) -> dict[str, Any]:
    rope = settings.get("rope_parameters") or {**settings, **(settings.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    odd = {
        f"positions of kind '{kind}'": kind not in ("default", "llama3"),
        f"activation {settings.get('hidden_act')}": settings.get("hidden_act", "silu") != "silu",
        "attention biases": bool(settings.get("attention_bias")),
        "MLP biases": bool(settings.get("mlp_bias")),
        "quantised weights": "quantization_config" in settings,
    }
    for what, is_there in odd.items():
        if is_there:
            raise Refused(f"the package has {what}, which the trainer does not compute", where=where, fix=FIX)
    heads, context = settings["num_attention_heads"], settings["max_position_embeddings"]
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    return {
        "family": settings["model_type"],
        "layers": settings["num_hidden_layers"],
        "hidden": settings["hidden_size"],
        "heads": heads,
        "kv_heads": settings.get("num_key_value_heads") or heads,
        "head_dim": settings.get("head_dim"),
        "ffn": settings["intermediate_size"],
        "max_context": min(context, window) if window else context,  # within a window all attention is the same
        "tied_embeddings": settings.get("tie_word_embeddings", False),
        "rope_theta": rope.get("rope_theta", settings.get("rope_theta", 10_000.0)),
        "rope_scaling": _scaling(rope) if kind == "llama3" else None,
        "norm_eps": settings["rms_norm_eps"],
    }


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return {**{name: rope[name] for name in names}, "original_context": rope["original_max_position_embeddings"]}


def holds_adapters(directory: Path) -> bool:
    """Whether a package is of adapters alone, a model only with its base."""
    return (directory / ADAPTERS_CONFIG).is_file()


def weight_files(directory: Path) -> list[str]:
    index, fix = read_json(directory / "model.safetensors.index.json"), "Export or download it again."
    try:
        names = ["model.safetensors"] if index is None else sorted(set(index["weight_map"].values()))
    except (AttributeError, KeyError, TypeError):
        raise Refused("model.safetensors.index.json is damaged", where=str(directory), fix=fix) from None
    if holds_adapters(directory):
        names = [ADAPTERS]
    for name in names:
        if not (directory / name).is_file():
            raise Refused(f"the model package cannot be read: {name} is absent", where=str(directory), fix=fix)
    return names


def weights_digest(directory: Path) -> str:
    """sha256 of the weights; of several files the digest of theirs."""
    digests = {name: sha256_of_file(directory / name) for name in weight_files(directory)}
    return next(iter(digests.values())) if len(digests) == 1 else digest_of(digests)
