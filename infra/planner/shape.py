"""Counts from a model's shape: parameters, FLOPs a token, KV bytes a token."""

from infra.spec import ModelShape


def parameters(model: ModelShape, *, vocab_size: int) -> int:
    """Parameters of a Llama-family decoder: embeddings, attention (GQA), gated MLP, two norms a layer and one at the end.

    N = (1|2)·V·h + L·(h·a·d + 2·h·k·d + a·d·h + 3·h·f + 2h) + h.
    """
    h, d = model.hidden, model.width_of_head
    attention = 2 * h * model.heads * d + 2 * h * model.kv_heads * d
    block = attention + 3 * h * model.ffn + 2 * h
    embeddings = (1 if model.tied_embeddings else 2) * vocab_size * h
    return embeddings + model.layers * block + h


def matmul_parameters(model: ModelShape, *, vocab_size: int) -> int:
    """Parameters that multiply an activation: all but the norms and the input embedding; the output embedding counts once."""
    h, d = model.hidden, model.width_of_head
    block = 2 * h * model.heads * d + 2 * h * model.kv_heads * d + 3 * h * model.ffn
    return vocab_size * h + model.layers * block


def flops_per_token(model: ModelShape, *, vocab_size: int, seq: int) -> float:
    """Forward and backward FLOPs of one token, 6·N_matmul + 12·L·a·d·s: full attention, input embedding not counted (PaLM, app. B)."""
    attention = 12 * model.layers * model.heads * model.width_of_head * seq
    return 6 * matmul_parameters(model, vocab_size=vocab_size) + attention


def kv_bytes_per_token(model: ModelShape, *, bytes_per_value: int) -> int:
    """Bytes of keys and values that one token holds in the cache, over all layers: 2·L·k·d·bytes."""
    return 2 * model.layers * model.kv_heads * model.width_of_head * bytes_per_value
