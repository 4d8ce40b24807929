"""Reads the weights of a Hugging Face directory into a `Llama`, with every name and shape accounted for."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serving.errors import Refused
from serving.model.config import ModelConfig
from serving.model.llama import Llama
from serving.model.shard import AXIS, COLUMNS, WHOLE, Shard

ATTENTION, MLP = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."

# Our parameter → the checkpoint's tensors, laid one below the other.
LAYER_SOURCES = {
    "attention_norm": ("model.layers.{i}.input_layernorm",),
    "attention.qkv": (ATTENTION + "q_proj", ATTENTION + "k_proj", ATTENTION + "v_proj"),
    "attention.out": (ATTENTION + "o_proj",),
    "attention.q_norm": (ATTENTION + "q_norm",),
    "attention.k_norm": (ATTENTION + "k_norm",),
    "ffn_norm": ("model.layers.{i}.post_attention_layernorm",),
    "ffn.gate_up": (MLP + "gate_proj", MLP + "up_proj"),
    "ffn.down": (MLP + "down_proj",),
}
TOP_SOURCES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def load(
    root: Path, config: ModelConfig, *,
    device: torch.device, dtype: torch.dtype, on_bytes: Callable[[int, int], None], shard: Shard = WHOLE,
) -> Llama:  # fmt: skip
    """The model, or one rank's share of it, with its weights on `device`. `on_bytes(done, total)` tells progress.

    `config` is the share's own shape (see `shard.narrowed`).

    Raises `Refused`, naming the file, when a file is truncated, or a tensor is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = Llama(config)
    files = _tensor_files(root)
    total_bytes = sum(path.stat().st_size for path in set(files.values()))
    done_bytes = 0
    state: dict[str, Tensor] = {}
    handles = {path: _open(path) for path in sorted(set(files.values()))}
    for name, parameter in model.named_parameters():
        parts = []
        for source in _sources(name):
            if source not in files:
                raise Refused(f"tensor '{source}' is missing", where=str(root), fix="Export the model again")
            part = _share(handles[files.pop(source)], source, name, shard)
            done_bytes += part.nbytes
            parts.append(part.to(device=device, dtype=dtype))
        # torch.cat copies, so that a package replaced on disk never changes, or tears, the weights being served.
        state[name] = torch.cat(parts)
        if state[name].shape != parameter.shape:
            what = f"'{name}' has shape {tuple(state[name].shape)}, the config says {tuple(parameter.shape)}"
            raise Refused(what, where=str(root), fix="config.json and the weights are of different models")
        on_bytes(min(done_bytes, total_bytes), total_bytes)
    unread = [name for name in files if not (config.tied and name == "lm_head.weight") and "rotary_emb" not in name]
    if unread:
        what = f"{len(unread)} tensors have no place in a {config.family} model, such as '{unread[0]}'"
        raise Refused(what, where=str(root), fix="config.json and the weights are of different models")
    if config.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    model.compute_dtype = dtype
    on_bytes(total_bytes, total_bytes)
    return model.requires_grad_(False).eval()


def _share(file: safe_open, source: str, name: str, shard: Shard) -> Tensor:
    """The checkpoint's tensor, or what one rank has of it: only that is read from the file."""
    place, kind = _place(name)
    axis = AXIS.get(place)
    if shard.size == 1 or axis is None:
        return file.get_tensor(source)
    if axis == COLUMNS and kind == "bias":  # added once, by rank 0: what the ranks have is summed
        return file.get_tensor(source) * (shard.rank == 0)
    whole = file.get_slice(source)
    start, stop = shard.span(whole.get_shape()[axis])
    if axis == COLUMNS:
        return whole[:, start:stop]
    part = whole[start:stop]
    missing = shard.each(whole.get_shape()[axis]) - len(part)  # of a vocabulary that the ranks do not divide
    return torch.cat((part, part.new_zeros(missing, *part.shape[1:]))) if missing else part


def _sources(name: str) -> list[str]:
    """The checkpoint's names for our parameter `name`, such as `blocks.3.attention.qkv.weight`."""
    place, kind = _place(name)
    if place in TOP_SOURCES:
        return [f"{TOP_SOURCES[place]}.{kind}"]
    layer = name.split(".", 2)[1]
    return [f"{source.format(i=layer)}.{kind}" for source in LAYER_SOURCES[place]]


def _place(name: str) -> tuple[str, str]:
    """(a layer's place, `weight` or `bias`) of our parameter `name`."""
    place, _, kind = name.rpartition(".")
    return place if place in TOP_SOURCES else place.split(".", 2)[2], kind


def _tensor_files(root: Path) -> dict[str, Path]:
    """Each tensor's name → the file that holds it."""
    index, single = root / "model.safetensors.index.json", root / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise Refused("model.safetensors is missing", where=str(root), fix="Export the model as safetensors")
        return dict.fromkeys(_open(single).keys(), single)
    try:
        files = {str(name): root / str(file) for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError):
        raise Refused("the index of shards cannot be read", where=str(index), fix="Export the model again") from None
    for path in set(files.values()):
        if not path.is_file() or path.parent != root:
            raise Refused("a shard of the model is missing", where=str(path), fix="Copy or export the model again")
    return files


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        what = f"the file is truncated or no safetensors file: {error}"
        raise Refused(what, where=str(path), fix="Copy or export the model again") from None
