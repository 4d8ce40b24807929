"""Reading a model package: a Hugging Face directory of the Llama, Mistral, Qwen2 or Qwen3 family."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.config import LoraConfig, ModelConfig, TrainConfig
from trainer.data import Dataset
from trainer.data.tokenizer import read_tokenizer
from trainer.errors import Refused
from trainer.files import digest_of, read_json, sha256_of_file
from trainer.lora import add_lora, merged, peft_name
from trainer.model import Decoder
from trainer.shapes import (
    ADAPTERS,
    ADAPTERS_CONFIG,
    FIX,
    holds_adapters,
    read_settings,
    shape_of,
    weight_files,
)


def make_decoder(config: TrainConfig, *, vocab_size: int, labels: int | None) -> Decoder:
    """The model that a config trains: a classifier where there are labels, with adapters where it says so."""
    model = Decoder(config.model, vocab_size=vocab_size, labels=labels)
    if config.lora is not None:
        add_lora(model, config.lora)
    return model


@dataclass(frozen=True)
class Origin:
    """What a run begins from: a package, or nothing."""

    package: Path | None
    identity: dict[str, str]
    """What it adds to the identity of the run."""

    @classmethod
    def of(cls, package: Path | None, *, dataset: Dataset, lora: bool) -> "Origin":
        """Raises Refused where the package and the dataset do not speak of the same tokens."""
        if package is None:
            if lora:
                fix = "Name the package to tune: base=DIR."
                raise Refused("adapters of a model with random weights learn nothing", where="lora", fix=fix)
            return cls(None, {})
        settings = read_settings(package)
        if settings["vocab_size"] != dataset.vocab_size or not _same_tokenizer(package, dataset.directory):
            fix = f"Make the dataset with its tokenizer: python -m trainer.data … base={package}."
            raise Refused("the package and the dataset have different tokenizers", where=str(package), fix=fix)
        return cls(package, {"base_digest": package_digest(package)})


def _same_tokenizer(one: Path, other: Path) -> bool:
    ours, theirs = (read_tokenizer(directory / "tokenizer.json").to_str() for directory in (one, other))
    return ours == theirs


def package_digest(directory: Path) -> str:
    """Of the shape and the weights."""
    names = ["config.json", *weight_files(directory)]
    return digest_of({name: sha256_of_file(directory / name) for name in names})


def load_package(directory: Path, *, base: Path | None = None) -> Decoder:
    """The model of a package, in float32; one of adapters is merged into its `base`, by default where it was trained.

    Raises Refused for a directory that is no whole package, and for a base that is not the adapters' own.
    """
    try:
        adapters = _Adapters.read(directory, base) if holds_adapters(directory) else None
        whole = adapters.base if adapters else directory
        settings = read_settings(whole)
        classes = len(settings.get("id2label") or {}) if _classifies(settings) else None
        if adapters:
            classes = adapters.classes
        config = ModelConfig.model_validate(shape_of(settings, where=str(whole)))
        model = Decoder(config, vocab_size=settings["vocab_size"], labels=classes)
        fill(_named([model]), whole, new=("score.",) if adapters else ())
        if adapters:
            adapters.merge_into(model)
    except Refused:
        raise
    except Exception as error:  # whatever a cut or foreign file makes of itself
        reason = str(error).splitlines()[0]
        fix = "Export it again: remove it and run the trainer."
        raise Refused(f"the model package cannot be read: {reason}", where=str(directory), fix=fix) from None
    return model.eval()


@dataclass(frozen=True)
class _Adapters:
    """What `lora.export: adapters` wrote, and the package that it is for."""

    base: Path
    config: LoraConfig
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, directory: Path, base: Path | None) -> "_Adapters":
        about, provenance = (read_json(directory / name) or {} for name in (ADAPTERS_CONFIG, "slipway.json"))
        base = base or Path(about.get("base_model_name_or_path") or "base")
        fix = "Name the package that they were trained on: base=DIR."
        if not (base / "config.json").is_file():
            raise Refused("the base of the adapters is not there", where=str(base), fix=fix)
        if provenance.get("base_digest") != package_digest(base):
            raise Refused(f"{directory} was not trained on this base", where=str(base), fix=fix)
        config = LoraConfig(rank=about["r"], alpha=about["lora_alpha"], targets=about["target_modules"])
        return cls(base, config, load_file(directory / ADAPTERS))

    @property
    def classes(self) -> int | None:
        head = self.tensors.get(peft_name("score.weight"))
        return None if head is None else len(head)

    @torch.no_grad()
    def merge_into(self, model: Decoder) -> None:
        left = dict(self.tensors)
        for name, parameter in model.named_parameters():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module.rpartition(".")[2] in self.config.targets:
                a, b = (left.pop(peft_name(f"{module}.lora_{side}")) for side in "AB")
                parameter.copy_(merged(parameter, a, b, config=self.config))
            elif name == "score.weight":
                parameter.copy_(left.pop(peft_name(name)))
        if left:
            raise ValueError(f"the model has no place for {min(left)}")


def _classifies(settings: dict[str, Any]) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in settings.get("architectures") or [])


def begin_from(parts: Sequence[nn.Module], package: Path, *, plain_name: Callable[[str], str]) -> None:
    """Fills what this rank holds of a model with the weights of a package; adapters and a new head stay as they are."""
    fill({plain_name(name): parameter for name, parameter in _named(parts).items()}, package, new=("lora_", "score."))


def _named(parts: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    return {name: parameter for part in parts for name, parameter in part.named_parameters()}


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], directory: Path, *, new: tuple[str, ...] = ()) -> None:
    """Reads each tensor when it is its turn: beside the parameters, only one lies in memory."""
    missing = {name for name in parameters if not any(word in name for word in new)}
    for file in weight_files(directory):
        try:
            with safe_open(directory / file, framework="pt") as tensors:
                for name in set(tensors.keys()) & parameters.keys():
                    _copy(parameters[name], tensors.get_tensor(name), name, directory)
                    missing.discard(name)
        except SafetensorError as error:
            fix = "Export or download it again."
            raise Refused(f"the model package cannot be read: {error}", where=str(directory / file), fix=fix) from None
    if missing:
        fix = "Export it again: remove it and run the trainer."
        raise Refused(f"the model package has no {min(missing)}", where=str(directory), fix=fix)


def _copy(parameter: nn.Parameter, value: Tensor, name: str, directory: Path) -> None:
    if parameter.shape != value.shape:
        shapes = f"{list(value.shape)}, not {list(parameter.shape)}"
        raise Refused(f"{name} of the package has shape {shapes}", where=str(directory), fix=FIX)
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)
