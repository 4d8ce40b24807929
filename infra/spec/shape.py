"""The shape of a decoder that is trained: what the trainer's families have in common, and what sets them apart."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infra.spec.base import Misplaced, PositiveFloat, PositiveInt, Spec

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
# Far above every model, and small enough to look through for the nearest that divides.
Width = Annotated[int, Field(ge=1, le=1 << 24)]
Heads = Annotated[int, Field(ge=1, le=1 << 16)]


class RopeScaling(Spec):
    """Llama 3.1's: waves longer than `original_context` / `low_freq_factor` turn `factor` times slower."""

    factor: PositiveFloat
    """How much slower; above 1."""
    low_freq_factor: PositiveFloat
    """Waves longer than `original_context` over this are slowed down whole."""
    high_freq_factor: PositiveFloat
    """Waves shorter than `original_context` over this stay; those between are blended."""
    original_context: PositiveInt
    """Positions that the wavelengths were made for."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.factor <= 1:
            raise Misplaced(f"factor {self.factor:g} slows nothing down; it must be above 1", "factor")
        if self.high_freq_factor <= self.low_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise Misplaced(f"{high:g} must be above low_freq_factor {low:g}", "high_freq_factor")
        return self


class ModelShape(Spec):
    """A decoder of the Llama, Mistral, Qwen2 or Qwen3 family."""

    family: Family = "llama"
    """`qwen2` adds biases before attention, `qwen3` norms of queries and keys; `mistral` is Llama under another name."""
    layers: Annotated[int, Field(ge=1, le=10_000)]
    """Transformer blocks."""
    hidden: Width
    """Width of the residual stream."""
    heads: Heads
    """Query heads."""
    kv_heads: Heads
    """Key/value heads (grouped-query attention); divides `heads`."""
    head_dim: Heads | None = None
    """Width of a head; null: hidden / heads."""
    ffn: Width
    """Inner width of the gated MLP."""
    max_context: PositiveInt
    """Positions; written once, the server's longest context follows it."""
    tied_embeddings: bool = True
    """Input and output embeddings are one matrix."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding's wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Longer contexts by slower waves, as in Llama 3.1; null: none."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % self.heads:
            near = self.hidden // self.heads * self.heads or self.heads
            raise Misplaced(
                f"hidden {self.hidden} is not a multiple of heads {self.heads}; the nearest below is {near}", "hidden"
            )
        if self.width_of_head % 2:
            key = "head_dim" if self.head_dim else "hidden"
            raise Misplaced(f"a head is {self.width_of_head} wide, and rotary embeddings turn pairs; make it even", key)
        if self.heads % self.kv_heads:
            divisors = [k for k in range(1, self.heads + 1) if self.heads % k == 0]
            nearest = min(divisors, key=lambda k: abs(k - self.kv_heads))
            raise Misplaced(
                f"kv_heads {self.kv_heads} does not divide heads {self.heads}; the nearest that does is {nearest}",
                "kv_heads",
            )
        return self

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden // self.heads
