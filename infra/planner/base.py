"""The shape of a package that a training begins from: as the stack says it, by a name of the catalogue, or of its config.json."""

import json
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from infra.catalog import model as known_model
from infra.planner.shape import Shape
from infra.spec import Base, ModelShape, Training, Unplannable

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""What the trainer computes: values of `model_type`."""


def with_shape(training: Training) -> Training:
    """`training` with the shape and the vocabulary of its base package. Raises `Unplannable` where nobody knows them."""
    base = training.base
    assert base is not None
    settings, where = _settings(base)
    family = str(settings.get("model_type", "llama"))
    if family not in FAMILIES:
        says = f"{where} has a model of type {family!r}, and the trainer tunes {', '.join(FAMILIES)}"
        raise Unplannable("training.base", says)
    try:
        shape = Shape.from_config(settings)
    except ValueError as error:
        raise Unplannable("training.base", f"{error} ({where})") from None
    context = int(settings.get("max_position_embeddings") or training.seq)
    if training.seq > context:
        raise Unplannable(
            "training.seq", f"{training.seq} is above the {context} positions of the base package; lower seq"
        )
    values = {
        "family": family,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "ffn": shape.ffn,
        "max_context": context,
        "tied_embeddings": shape.tied,
    }
    try:
        model = ModelShape.model_validate(values)
    except ValidationError as error:
        raise Unplannable("training.base", f"{where}: {error.errors()[0]['msg']}") from None
    data = training.data.model_copy(update={"vocab_size": shape.vocab})
    return training.model_copy(update={"model": model, "data": data})


def _settings(base: Base) -> tuple[dict[str, Any], str]:
    """The package's config.json, and the key or file that it was taken from."""
    if base.shape is not None:
        try:
            return known_model(base.shape), "training.base.shape"
        except ValueError as error:
            raise Unplannable("training.base.shape", str(error)) from None
    if base.here is None:
        raise Unplannable(
            "training.base",
            "the plan needs the package's shape, and a volume cannot be read from here; "
            "set shape to a model of the catalogue, or training.model",
        )
    file = base.here / "config.json"
    return _read(file), str(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unplannable(
            "training.base.path", f"there is no {file}; name a model package in Hugging Face layout"
        ) from None
    except (OSError, ValueError) as error:
        raise Unplannable("training.base.path", f"{file} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise Unplannable(
            "training.base.path", f"{file} holds no settings; name a model package in Hugging Face layout"
        )
    return cast("dict[str, Any]", settings)
