"""A decoder's shape and what follows from it alone: parameters, FLOPs a token, KV bytes a token."""

from dataclasses import dataclass
from typing import Any, Self, cast

from infra.spec import ModelShape


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What stands in for the MLP of a mixture of experts (Shazeer et al. 2017)."""

    count: int
    """Routed experts of a layer."""
    active: int
    """Routed experts that a token goes through."""
    ffn: int
    """Inner width of one."""
    shared_ffn: int = 0
    """Inner width of the experts that every token goes through, together."""
    dense_layers: int = 0
    """Layers that have one MLP, of the shape's `ffn`, instead."""

    def touched(self, *, tokens: float) -> float:
        """Share of the routed experts that at least one of `tokens` tokens goes through, under balanced routing."""
        return 1 - (1 - self.active / self.count) ** tokens


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, sec. 2.1): keys and values are kept as one vector that all heads share."""

    rank: int
    """Width of the vector (`kv_lora_rank`)."""
    rope: int
    """Width of the rotary key that is kept beside it."""
    key: int
    """Width of a head's key and query, less the rotary part."""
    value: int
    """Width of a head's value."""
    query_rank: int = 0
    """Width that queries go through; 0: projected at once."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder: embeddings, blocks of attention (MHA, GQA, MQA or latent) and MLP or experts, an output head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    """Width of a head; of latent attention the mean of its keys and values, as they are where scores are computed."""
    ffn: int
    """Inner width of the MLP; of a mixture of experts, that of its dense layers."""
    vocab: int
    experts: Experts | None = None
    latent: Latent | None = None
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
        """The shape in a Hugging Face `config.json`. Raises ValueError that names the key which is not there, or is no count."""
        names = {key: _checked(key, value) for key, value in config.items() if value is not None}

        def first(*keys: str) -> int:
            return _needed(names, *keys)

        hidden, heads = first("hidden_size", "n_embd", "d_model"), first("num_attention_heads", "n_head", "n_heads")
        gated = str(names.get("model_type", "llama")) not in UNGATED
        latent = _latent_of(names)
        width = (latent.key + latent.rope + latent.value) // 2 if latent else hidden // heads
        if not (latent or "head_dim" in names or width):
            raise ValueError(f"{heads} heads are more than hidden_size {hidden} of config.json has room for")
        return cls(
            layers=first("num_hidden_layers", "n_layer", "n_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=int(names.get("num_key_value_heads", names.get("num_kv_heads", heads))),
            head_dim=width if latent else int(names.get("head_dim", width)),
            ffn=int(names.get("intermediate_size", names.get("n_inner", names.get("ffn_dim", 4 * hidden)))),
            vocab=first("vocab_size"),
            gated=gated,
            tied=bool(names.get("tie_word_embeddings", not gated)),
            experts=_experts_of(names),
            latent=latent,
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
    def attention_matrices(self) -> int:
        """Parameters of a block's attention that multiply an activation: h·(a + 2k)·d + a·d·h, or those of latent attention."""
        if self.latent is None:
            return 2 * self.hidden * (self.q_width + self.kv_width)
        m, h = self.latent, self.hidden
        queries = self.heads * (m.key + m.rope)
        q = m.query_rank * (h + queries) if m.query_rank else h * queries
        return q + h * (m.rank + m.rope) + m.rank * self.heads * (m.key + m.value) + self.heads * m.value * h

    @property
    def routed_matrices(self) -> int:
        """Parameters of all layers' routed experts."""
        e = self.experts
        return 0 if e is None else (self.layers - e.dense_layers) * e.count * self._mlp(e.ffn)

    @property
    def matrices(self) -> int:
        """Parameters of all blocks that multiply an activation, of some token or other."""
        return self.layers * self.attention_matrices + self._mlps(self.experts.count if self.experts else 0)

    @property
    def active_matrices(self) -> int:
        """Those that one token multiplies: of the routed experts, the ones it goes through."""
        return self.layers * self.attention_matrices + self._mlps(self.experts.active if self.experts else 0)

    def _mlp(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden * width

    def _mlps(self, routed: int) -> int:
        """Parameters of all layers' MLPs, with `routed` experts in each that has experts."""
        e = self.experts
        if e is None:
            return self.layers * self._mlp(self.ffn)
        mixture = self._mlp(routed * e.ffn + e.shared_ffn) + self.hidden * e.count  # and the router
        return e.dense_layers * self._mlp(self.ffn) + (self.layers - e.dense_layers) * mixture

    @property
    def active_ffn(self) -> float:
        """Inner width of the MLP that a token goes through, in the mean over layers."""
        e = self.experts
        if e is None:
            return self.ffn
        mixture = e.active * e.ffn + e.shared_ffn
        return (e.dense_layers * self.ffn + (self.layers - e.dense_layers) * mixture) / self.layers

    @property
    def block_matrices(self) -> float:
        """Parameters of a block that multiply an activation, in the mean over layers."""
        return self.matrices / self.layers

    @property
    def block(self) -> float:
        """Parameters of a block: its matrices and two norms."""
        return self.block_matrices + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """N = (1|2)·V·h + L·(h·a·d + 2·h·k·d + a·d·h + 3·h·f + 2h) + h; two MLP matrices where there is no gate."""
        norms = (2 * self.layers + 1) * self.hidden
        return (1 if self.tied else 2) * self.embedding + self.matrices + norms + self.other

    @property
    def active_parameters(self) -> int:
        """Parameters less those of the experts that a token does not go through."""
        return self.parameters - self.matrices + self.active_matrices

    @property
    def matmul_parameters(self) -> int:
        """Parameters that multiply a token's activation: all but norms and input embedding; the output head counts once."""
        return self.embedding + self.active_matrices

    def attention_flops(self, *, seq: int) -> float:
        """Forward and backward FLOPs of one token's attention scores and sums, 12·L·a·d·s: full, not halved for causality."""
        return 12 * self.layers * self.q_width * seq

    def flops_per_token(self, *, seq: int) -> float:
        """Forward and backward FLOPs of one token, 6·N_matmul + 12·L·a·d·s (PaLM, appendix B; no input embedding)."""
        return 6 * self.matmul_parameters + self.attention_flops(seq=seq)

    def kv_bytes_per_token(self, *, bytes_per_value: float, tp: int = 1) -> float:
        """Bytes of keys and values that one token holds on one of `tp` GPUs, over all layers: 2·L·ceil(k/t)·d·bytes; of latent
        attention L·(rank + rope)·bytes, which every GPU holds whole."""
        if self.latent:
            return self.layers * (self.latent.rank + self.latent.rope) * bytes_per_value
        return 2 * self.layers * -(-self.kv_heads // tp) * self.head_dim * bytes_per_value


UNGATED = ("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "falcon", "mpt", "phi", "starcoder2", "gpt_bigcode")
"""Values of `model_type` whose MLP has two matrices."""


COUNTS = [
    "hidden_size",
    "n_embd",
    "d_model",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "vocab_size",
    "moe_intermediate_size",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
]
OR_NONE = [
    "n_routed_experts",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "experts_per_token",
    "decoder_sparse_step",
    "moe_layer_freq",
    "first_k_dense_replace",
    "shared_expert_intermediate_size",
    "n_shared_experts",
    "q_lora_rank",
]
"""Counts that may be 0 as well."""
MOST = 1 << 24
"""Far above every model."""


def _checked(key: str, value: Any) -> Any:
    """`value`, as a whole number where the key is a count. Raises ValueError where it cannot be one."""
    least = 1 if key in COUNTS else 0 if key in OR_NONE else None
    if least is None:
        return value
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole or not least <= value <= MOST:
        raise ValueError(f"`{key}` of config.json must be a whole number from {least} to {MOST}, and it is {value!r}")
    return int(value)


def _needed(names: dict[str, Any], *keys: str) -> int:
    """The first of `keys` that is there."""
    for key in keys:
        if key in names:
            return names[key]
    raise ValueError(f"config.json has no `{keys[0]}`: not a decoder that the planner knows")


def _experts_of(names: dict[str, Any]) -> Experts | None:
    """The mixture of experts in a config.json (Mixtral, Qwen2/3-MoE, DeepSeek, gpt-oss, OLMoE, GLM); None where it has none."""
    count = next(
        (int(names[key]) for key in ("n_routed_experts", "num_local_experts", "num_experts") if key in names), 0
    )
    if count <= 1:
        return None
    active = next((int(names[key]) for key in ("num_experts_per_tok", "experts_per_token") if key in names), 0)
    if not 0 < active <= count:
        raise ValueError(
            f"config.json has {count} experts and `num_experts_per_tok` {active}; it goes from 1 to {count}"
        )
    width = int(names.get("moe_intermediate_size", names.get("intermediate_size", 0)))
    layers = _needed(names, "num_hidden_layers", "n_layer", "n_layers")
    every = int(names.get("decoder_sparse_step", names.get("moe_layer_freq", 1)) or 1)
    only_dense: Any = names.get("mlp_only_layers", ())
    if not isinstance(only_dense, list | tuple):
        raise ValueError(f"`mlp_only_layers` of config.json must be a list, and it is {only_dense!r}")
    dense = int(names.get("first_k_dense_replace", 0)) + len(cast("list[Any]", only_dense))
    return Experts(
        count=count,
        active=active,
        ffn=width,
        shared_ffn=int(
            names.get("shared_expert_intermediate_size", width * int(names.get("n_shared_experts", 0) or 0))
        ),
        dense_layers=min(dense + (layers - dense) - (layers - dense) // every, layers),
    )


def _latent_of(names: dict[str, Any]) -> Latent | None:
    if "kv_lora_rank" not in names:
        return None
    return Latent(
        rank=_needed(names, "kv_lora_rank"),
        rope=_needed(names, "qk_rope_head_dim"),
        key=_needed(names, "qk_nope_head_dim"),
        value=_needed(names, "v_head_dim"),
        query_rank=int(names.get("q_lora_rank", 0)),
    )
