"""What the backward pass makes again instead of keeping it (Chen et al. 2016)."""

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from trainer.model import Block, Decoder

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,  # to send again costs more than to keep
    torch.ops._c10d_functional.all_gather_into_tensor.default,
}
"""What `selective` keeps: results that are dear to make and small beside what lies between them."""


def _policy(_context: Any, operation: Any, *_arguments: Any, **_more: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(decoder: Decoder, mode: str) -> None:
    """`full`: a block keeps its input alone; `selective`: also the results of its products, attention and collectives."""
    for name, layer in decoder.model.layers.named_children():
        if not isinstance(layer, Block) or mode == "none":
            continue
        more: dict[str, Any] = {}
        if mode == "selective":
            more["context_fn"] = lambda: create_selective_checkpoint_contexts(_policy)
        wrapped = checkpoint_wrapper(layer, preserve_rng_state=False, **more)
        decoder.model.layers.register_module(name, wrapped)


def plain_name(name: str) -> str:
    """A parameter's name in the model package, whatever wraps its block."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def inner_block(layer: nn.Module) -> nn.Module:
    """The block inside what may wrap it."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)
