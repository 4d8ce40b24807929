"""Tensor and sequence parallel (Shoeybi et al. 2019; Korthikanti et al. 2022) as DTensor plans over a model as it is.

Between the matrices the ranks share the sequence, Shard(1) of (B, L, D); inside a block each holds some heads and some
columns of the feed-forward part. The logits stay split over the vocabulary, and the loss is taken from the parts.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from trainer.model import Block, Decoder
from trainer.parallel.pipeline import is_tied

_ALL, _SEQUENCE = Replicate(), Shard(1)


def apply_tensor_parallel(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Splits what this decoder holds; a stage of a pipeline holds less than all."""
    plan: dict[str, ParallelStyle] = {}
    if isinstance(decoder.model.embed_tokens, nn.Embedding):
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=_ALL, output_layouts=_SEQUENCE)
    if isinstance(decoder.head, nn.Linear):
        plan["model.norm"] = SequenceParallel()
        plan["model"] = PrepareModuleOutput(output_layouts=_SEQUENCE, desired_output_layouts=_ALL)
        plan["lm_head"] = ColwiseParallel(input_layouts=_ALL, output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(decoder, mesh, plan)
    for layer in decoder.model.layers:
        if isinstance(layer, Block):
            _split_block(layer, mesh)
    if is_tied(decoder) and isinstance(decoder.head, nn.Linear):
        if isinstance(decoder.model.embed_tokens, nn.Embedding):
            decoder.lm_head.weight = decoder.model.embed_tokens.weight  # both are Shard(0) of it
        else:
            decoder.model.embed_tokens.weight = decoder.lm_head.weight


def _split_block(block: Block, mesh: DeviceMesh) -> None:
    plan: dict[str, ParallelStyle] = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_layouts=(_SEQUENCE, None, None, None), desired_input_layouts=(_ALL, None, None, None)
        ),
        **{f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
        "self_attn.o_proj": RowwiseParallel(output_layouts=_SEQUENCE),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(_SEQUENCE,), desired_input_layouts=(_ALL,)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=_SEQUENCE),
    }
    if block.self_attn.q_norm is not None:
        plan |= {
            f"self_attn.{name}": SequenceParallel(sequence_dim=2, use_local_output=True)
            for name in ("q_norm", "k_norm")
        }
    parallelize_module(block, mesh, plan)
