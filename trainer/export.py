"""Writing a model package: a directory in the Hugging Face layout that Transformers, vLLM and Slipway's server open.

The weights are streamed: one shard after another is read, written and let go, whether they come from a model in memory
or from a checkpoint that no single machine could hold.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from trainer.config import LoraConfig, ModelConfig
from trainer.data import END_OF_TEXT, Dataset
from trainer.data.tokenizer import TOKENIZER_FILES
from trainer.files import whole_directory, write_json, write_whole
from trainer.lora import merged, peft_config, peft_name
from trainer.model import Decoder
from trainer.shapes import ADAPTERS, ADAPTERS_CONFIG

# A base model has seen no chats: its template is the text of the messages, one after another, for it to go on from.
CHAT_TEMPLATE = "{{ messages | map(attribute='content') | join('\\n') }}"
SHARD_BYTES = 2 << 30

_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

Read = Callable[[list[str]], dict[str, Tensor]]
"""Parameters by their names, as a dict of whole tensors on the CPU."""


def package_config(
    config: ModelConfig, *, vocab_size: int, end_of_text: int, labels: list[str] | None = None
) -> dict[str, Any]:
    """`config.json` of Transformers' classes of the family."""
    scaling = config.rope_scaling
    stretched = scaling and {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
    head = "ForCausalLM" if labels is None else "ForSequenceClassification"
    settings: dict[str, Any] = {
        "architectures": [f"{_CLASSES[config.family]}{head}"],
        "model_type": config.family,
        "vocab_size": vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": stretched,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }
    if config.family == "llama":
        settings |= {"attention_bias": False, "mlp_bias": False}
    if config.family == "mistral":
        settings["sliding_window"] = None
    if labels is not None:
        settings |= {"id2label": {str(n): name for n, name in enumerate(labels)}, "num_labels": len(labels)}
        settings["label2id"] = {name: number for number, name in enumerate(labels)}
    return settings


def export_package(
    model: Decoder,
    dataset: Dataset,
    target: Path,
    *,
    provenance: dict[str, Any],
    lora: LoraConfig | None = None,
    base: Path | None = None,
    read: Read | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the package of a trained model in `target`, whole or not at all.

    `read` gets the weights where `model` is only their names and shapes. Adapters apart become a package of PEFT's,
    which names `base`.
    """
    read = read or _of_memory(model)
    with whole_directory(target) as directory:
        if lora is not None and lora.export == "adapters":
            _write_adapters(model, read, directory, lora=lora, base=base)
        else:
            _write_weights(model, read, directory, lora=lora, shard_bytes=shard_bytes)
            end = dataset.end_of_text
            settings = package_config(model.config, vocab_size=model.vocab_size, end_of_text=end, labels=dataset.labels)
            write_json(directory / "config.json", settings)
        _write_tokenizer(model, dataset, directory)
        write_json(directory / "slipway.json", provenance)


def _of_memory(model: Decoder) -> Read:
    parameters = dict(model.named_parameters())
    return lambda names: {name: parameters[name].detach().cpu().contiguous() for name in names}


# The weights


def _outputs(model: Decoder, lora: LoraConfig | None) -> Iterator[tuple[str, list[str], int]]:
    """(name in the package, the parameters that make it, its bytes); tied embeddings are written once."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if "lora_" in name:
            continue
        module = name.removesuffix("weight")
        adapters = [f"{module}lora_A", f"{module}lora_B"] if f"{module}lora_A" in parameters else []
        assert lora is not None or not adapters
        yield name, [name, *adapters], parameter.numel() * 4


def _write_weights(model: Decoder, read: Read, directory: Path, *, lora: LoraConfig | None, shard_bytes: int) -> None:
    shards: list[list[tuple[str, list[str], int]]] = [[]]
    for output in _outputs(model, lora):
        if shards[-1] and sum(size for *_, size in shards[-1]) + output[2] > shard_bytes:
            shards.append([])
        shards[-1].append(output)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        tensors = read([part for _, parts, _ in shard for part in parts])
        whole = {name: _made(parts, tensors, lora) for name, parts, _ in shard}
        save_file(whole, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(size for shard in shards for *_, size in shard)
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, *_ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _made(parts: list[str], tensors: dict[str, Tensor], lora: LoraConfig | None) -> Tensor:
    if len(parts) == 1:
        return tensors[parts[0]]
    assert lora is not None
    weight, a, b = (tensors[part] for part in parts)
    return merged(weight, a, b, config=lora)


def _write_adapters(model: Decoder, read: Read, directory: Path, *, lora: LoraConfig, base: Path | None) -> None:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors = {peft_name(name): tensor for name, tensor in read(names).items()}
    save_file(tensors, directory / ADAPTERS, metadata={"format": "pt"})
    about = peft_config(lora, base=str(base) if base else None, classifies=model.labels is not None)
    write_json(directory / ADAPTERS_CONFIG, about)


# The words around them


def _write_tokenizer(model: Decoder, dataset: Dataset, directory: Path) -> None:
    """The dataset's tokenizer, with what a base package said of it where the dataset was made with one."""
    end = dataset.end_of_text
    shutil.copyfile(dataset.directory / "tokenizer.json", directory / "tokenizer.json")
    template = dataset.directory / "chat_template.jinja"
    write_whole(directory / "chat_template.jinja", template.read_text("utf-8") if template.exists() else CHAT_TEMPLATE)
    for name in TOKENIZER_FILES:
        if (dataset.directory / name).is_file():
            shutil.copyfile(dataset.directory / name, directory / name)
    if not (directory / "tokenizer_config.json").exists():
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "model_max_length": model.config.max_context,
            "clean_up_tokenization_spaces": False,
        }
        write_json(directory / "tokenizer_config.json", about)
    if not (directory / "generation_config.json").exists():
        turn = dataset.manifest.end_of_turn
        ends = end if turn is None else [turn, end]
        write_json(directory / "generation_config.json", {"bos_token_id": end, "eos_token_id": ends, "do_sample": True})
