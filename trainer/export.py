"""The model package: a directory in the Hugging Face layout that Transformers, vLLM and Slipway's server open as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trainer.config import ModelConfig
from trainer.data import END_OF_TEXT, Dataset
from trainer.errors import Refused
from trainer.files import read_json, whole_directory, write_json, write_whole
from trainer.model import Decoder

# A base model has seen no chats: its template is the text of the messages, one after another, for it to go on from.
CHAT_TEMPLATE = "{{ messages | map(attribute='content') | join('\\n') }}"


def package_config(config: ModelConfig, *, vocab_size: int, end_of_text: int) -> dict[str, Any]:
    """`config.json` of Transformers' LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }


def export_package(model: Decoder, dataset: Dataset, target: Path, *, provenance: dict[str, Any]) -> None:
    """Writes the package of a trained model in `target`, whole or not at all."""
    config, end = model.config, dataset.end_of_text
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if config.tied_embeddings:
        del weights["lm_head.weight"]  # it is the embedding: written once
    with whole_directory(target) as directory:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        write_json(directory / "config.json", package_config(config, vocab_size=model.vocab_size, end_of_text=end))
        shutil.copyfile(dataset.directory / "tokenizer.json", directory / "tokenizer.json")
        write_json(
            directory / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END_OF_TEXT,
                "eos_token": END_OF_TEXT,
                "model_max_length": config.max_context,
                "clean_up_tokenization_spaces": False,
            },
        )
        write_json(directory / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "do_sample": True})
        write_whole(directory / "chat_template.jinja", CHAT_TEMPLATE)
        write_json(directory / "slipway.json", provenance)


def load_package(directory: Path) -> Decoder:
    """The model of a package, in float32. Raises Refused for a directory that is no whole Llama package."""
    settings = read_json(directory / "config.json")
    if settings is None:
        raise Refused("there is no model package", where=str(directory), fix="Name the model/ of a finished run.")
    if settings.get("model_type") != "llama":
        found = settings.get("model_type", "unknown")
        raise Refused(f"the model is of type '{found}', not llama", where=str(directory), fix="Name a Llama package.")
    try:
        model = Decoder(_shape_of(settings), vocab_size=settings["vocab_size"])
        weights = _read_weights(directory)
        if settings.get("tie_word_embeddings"):
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except Refused:
        raise
    except Exception as error:  # whatever a cut or foreign file makes of itself
        reason = str(error).splitlines()[0]
        fix = "Export it again: remove it and run the trainer."
        raise Refused(f"the model package cannot be read: {reason}", where=str(directory), fix=fix) from None
    return model.eval()


def _shape_of(settings: dict[str, Any]) -> ModelConfig:
    rope = settings.get("rope_parameters") or settings
    return ModelConfig(
        layers=settings["num_hidden_layers"],
        hidden=settings["hidden_size"],
        heads=settings["num_attention_heads"],
        kv_heads=settings["num_key_value_heads"],
        head_dim=settings.get("head_dim"),
        ffn=settings["intermediate_size"],
        max_context=settings["max_position_embeddings"],
        tied_embeddings=settings.get("tie_word_embeddings", False),
        rope_theta=rope["rope_theta"],
        norm_eps=settings["rms_norm_eps"],
    )


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        weights.update(load_file(directory / name))
    return weights
