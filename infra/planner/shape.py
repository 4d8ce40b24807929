"""A decoder's shape and what follows from it alone: parameters, FLOPs a token, KV bytes a token."""

from dataclasses import dataclass
from typing import Any, Self

from infra.spec import ModelShape


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense decoder: embeddings, blocks of attention (MHA, GQA or MQA) and MLP, an output head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    """The MLP has a gate beside its up-projection (SwiGLU): three matrices, not two."""
    tied: bool = False
    """Input and output embeddings are one matrix."""
    other: int = 0
    """Parameters that the formulas below do not count: biases, learned positions."""

    @classmethod
    def of(cls, model: ModelShape, *, vocab_size: int) -> Self:
        """The shape that a stack file declares."""
        q_and_kv = (model.heads + 2 * model.kv_heads) * model.width_of_head
        of_family = {"qwen2": q_and_kv, "qwen3": 2 * model.width_of_head}  # biases before attention; norms of q and k
        return cls(
            layers=model.layers,
            hidden=model.hidden,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.width_of_head,
            ffn=model.ffn,
            vocab=vocab_size,
            tied=model.tied_embeddings,
            other=model.layers * of_family.get(model.family, 0),
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The shape in a Hugging Face `config.json`. Raises ValueError that names the key which is not there."""
        names = {key: value for key, value in config.items() if value is not None}

        def first(*keys: str) -> int:
            for key in keys:
                if key in names:
                    return int(names[key])
            raise ValueError(f"config.json has no `{keys[0]}`: not a decoder that the planner knows")

        if any(key in names for key in ("num_local_experts", "num_experts", "n_routed_experts")):
            raise ValueError("config.json is of a mixture of experts; the planner knows dense decoders")
        hidden, heads = first("hidden_size", "n_embd", "d_model"), first("num_attention_heads", "n_head", "n_heads")
        gated = str(names.get("model_type", "llama")) not in UNGATED
        return cls(
            layers=first("num_hidden_layers", "n_layer", "n_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=int(names.get("num_key_value_heads", names.get("num_kv_heads", heads))),
            head_dim=int(names.get("head_dim", hidden // heads)),
            ffn=int(names.get("intermediate_size", names.get("n_inner", names.get("ffn_dim", 4 * hidden)))),
            vocab=first("vocab_size"),
            gated=gated,
            tied=bool(names.get("tie_word_embeddings", not gated)),
        )

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of keys, and again of values."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of one embedding matrix."""
        return self.vocab * self.hidden

    @property
    def block_matrices(self) -> int:
        """Parameters of a block that multiply an activation."""
        attention = 2 * self.hidden * (self.q_width + self.kv_width)
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def block(self) -> int:
        """Parameters of a block: its matrices and two norms."""
        return self.block_matrices + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """N = (1|2)·V·h + L·(h·a·d + 2·h·k·d + a·d·h + 3·h·f + 2h) + h; two MLP matrices where there is no gate."""
        return (1 if self.tied else 2) * self.embedding + self.layers * self.block + self.hidden + self.other

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply an activation: all but norms and input embedding; the output head counts once."""
        return self.embedding + self.layers * self.block_matrices

    def attention_flops(self, *, seq: int) -> float:
        """Forward and backward FLOPs of one token's attention scores and sums, 12·L·a·d·s: full, not halved for causality."""
        return 12 * self.layers * self.q_width * seq

    def flops_per_token(self, *, seq: int) -> float:
        """Forward and backward FLOPs of one token, 6·N_matmul + 12·L·a·d·s (PaLM, appendix B; no input embedding)."""
        return 6 * self.matmul_parameters + self.attention_flops(seq=seq)

    def kv_bytes_per_token(self, *, bytes_per_value: float, tp: int = 1) -> float:
        """Bytes of keys and values that one token holds on one of `tp` GPUs, over all layers: 2·L·ceil(k/t)·d·bytes."""
        return 2 * self.layers * -(-self.kv_heads // tp) * self.head_dim * bytes_per_value


UNGATED = ("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "falcon", "mpt", "phi", "starcoder2", "gpt_bigcode")
"""Values of `model_type` whose MLP has two matrices."""
