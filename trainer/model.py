"""A decoder of the Llama family (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Llama, Mistral, Qwen2 (biases before attention) and Qwen3 (norms of queries and keys) are one model with a switch or two.
There is no parallel code here: `parallel.py` applies it from outside. The names of the parameters are those of the
Hugging Face layout, so that a state dict is a model package's content as it stands.
Sizes in shapes: B sequences, L positions, D hidden, H heads, K key/value heads, W width of a head, V vocabulary.
"""

import math
import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig, RopeScaling
from trainer.kernels import decoder as kernels
from trainer.loss import cross_entropy


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of every position, each (max_context, W), for the halves convention of `turn`.

    The first half of the sines is negative: the turn of (a, b) is (a·cos - b·sin, b·cos + a·sin), which is then
    x·cos + swap(x)·sin with no negation on the way.
    """
    width = config.head_width
    frequencies = config.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if config.rope_scaling is not None:
        frequencies = _stretched(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(config.max_context, dtype=torch.float64), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).float(), torch.cat([-sin, sin], -1).float()


def _stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's context extension: long waves `factor` times slower, short ones as they were, a ramp in between."""
    turns = scaling.original_context * frequencies / (2 * math.pi)  # over the context that the model was trained for
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def turn(x_BHLW: Tensor, cos_LW: Tensor, sin_LW: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021); pairs are (i, i + W/2), as Hugging Face's Llama has them."""
    return (x_BHLW * cos_LW + x_BHLW.roll(x_BHLW.shape[-1] // 2, -1) * sin_LW).to(x_BHLW.dtype)


class Sight(NamedTuple):
    """What each position sees, said in two ways: a mask that is true there, and the first position of all up to itself."""

    mask_B1LL: Tensor
    first_BL: Tensor


class SameDocument(nn.Module):
    """Who may look at whom; no parameters."""

    def forward(self, documents_BL: Tensor) -> Sight:
        """Each position sees itself and what came before it in its own document."""
        same_BLL = (documents_BL.unsqueeze(2) == documents_BL.unsqueeze(1)).tril_()
        return Sight(same_BLL.unsqueeze(1), same_BLL.byte().argmax(-1))


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019; computed in float32 whatever the dtype of the input."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) to the same."""
        if kernels.fits_norm(x, self.weight):
            return kernels.norm(x, self.weight, eps=self.eps)
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class CausalAttention(nn.Module):
    """Every position attends to itself and to what came before it, or to what the mask says; no parameters."""

    def forward(self, q_BHLW: Tensor, k_BKLW: Tensor, v_BKLW: Tensor, mask_B1LL: Tensor | None) -> Tensor:
        grouped = q_BHLW.shape[1] != k_BKLW.shape[1]
        return F.scaled_dot_product_attention(
            q_BHLW, k_BKLW, v_BKLW, attn_mask=mask_B1LL, is_causal=mask_B1LL is None, enable_gqa=grouped
        )


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.head_width
        bias = config.family == "qwen2"
        self.q_proj = nn.Linear(config.hidden, config.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * self.width, bias=bias)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * self.width, bias=bias)
        self.o_proj = nn.Linear(config.heads * self.width, config.hidden, bias=False)
        normed = config.family == "qwen3"
        self.q_norm = RMSNorm(self.width, eps=config.norm_eps) if normed else None
        self.k_norm = RMSNorm(self.width, eps=config.norm_eps) if normed else None
        self.attend = CausalAttention()

    def forward(self, x_BLD: Tensor, cos_LW: Tensor, sin_LW: Tensor, mask_B1LL: Tensor | None = None) -> Tensor:
        """`mask_B1LL` is true where a position may look; without it each sees all that came before."""
        length = x_BLD.shape[1]
        return self.join(self.attend(*self.split(x_BLD, cos_LW[:length], sin_LW[:length]), mask_B1LL))

    def split(self, x_BLD: Tensor, cos_LW: Tensor, sin_LW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned, and values: (B, H, L, W) and twice (B, K, L, W)."""
        q_BHLW = turn(self._heads(self.q_proj(x_BLD), self.q_norm), cos_LW, sin_LW)
        k_BKLW = turn(self._heads(self.k_proj(x_BLD), self.k_norm), cos_LW, sin_LW)
        return q_BHLW, k_BKLW, self._heads(self.v_proj(x_BLD))

    def join(self, y_BHLW: Tensor) -> Tensor:
        """What the heads found, as (B, L, D)."""
        return self.o_proj(y_BHLW.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor, norm: RMSNorm | None = None) -> Tensor:
        split_BLHW = projected.unflatten(-1, (-1, self.width))
        return (split_BLHW if norm is None else norm(split_BLHW)).transpose(1, 2)


class SwiGLU(nn.Module):
    """Shazeer 2020."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.eps = config.norm_eps

    def forward(self, x_BLD: Tensor, cos_LW: Tensor, sin_LW: Tensor, sight: Sight | None = None) -> Tensor:
        mask_B1LL, first_BL = sight or (None, None)
        if self._has_kernels(x_BLD):
            attention, mlp = self.self_attn, self.mlp
            matrices = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
            into = (self.input_layernorm.weight, *(each.weight for each in matrices))
            out = (self.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            return kernels.block(x_BLD, (*into, *out), (cos_LW, sin_LW), first_BL, eps=self.eps)
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos_LW, sin_LW, mask_B1LL)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))

    def _has_kernels(self, x_BLD: Tensor) -> bool:
        """For a CPU, where no other attention was put in the place of ours."""
        attention, mlp = self.self_attn, self.mlp
        if (
            type(attention.attend) is not CausalAttention
            or attention.q_norm is not None
            or not kernels.fits(attention.width)
        ):
            return False
        matrices = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        return kernels.usable(x_BLD, *matrices, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, eps=config.norm_eps)
        self.sight = SameDocument()
        cos_LW, sin_LW = rope_tables(config)
        self.cos_LW: Tensor
        self.sin_LW: Tensor
        self.register_buffer("cos_LW", cos_LW, persistent=False)
        self.register_buffer("sin_LW", sin_LW, persistent=False)

    def forward(self, tokens_BL: Tensor, documents_BL: Tensor | None = None) -> Tensor:
        sight = None if documents_BL is None else self.sight(documents_BL)
        x_BLD = self.embed_tokens(tokens_BL)
        for layer in self.layers:
            x_BLD = layer(x_BLD, self.cos_LW, self.sin_LW, sight)
        return self.norm(x_BLD)


class Decoder(nn.Module):
    """Tokens in, logits out; with targets, the loss instead.

    With `labels` it is a classifier: `score` in the place of `lm_head` gives each position's logits of the classes, and
    the targets have the class where a text ends.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, labels: int | None = None) -> None:
        super().__init__()
        self.config, self.vocab_size, self.labels = config, vocab_size, labels
        self.model = Backbone(config, vocab_size=vocab_size)
        if labels is not None:
            self.score = nn.Linear(config.hidden, labels, bias=False)
        else:
            self.lm_head = nn.Linear(config.hidden, vocab_size, bias=False)
            if config.tied_embeddings:
                self.lm_head.weight = self.model.embed_tokens.weight
        for name, parameter in self.named_parameters():
            initialise(name, parameter, seed=torch.initial_seed())

    @property
    def head(self) -> nn.Linear:
        return self.lm_head if self.labels is None else self.score

    def forward(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits (B, L, V or labels); given targets, their cross-entropy in nats instead.

        It is the `mean` or the `sum` of the targets that are not -100. Given the number of the document that each
        position is of, no position sees another document.
        """
        x_BLD = self.model(tokens_BL, documents_BL)
        if targets_BL is None:
            return self.head(x_BLD)
        return cross_entropy(self.head, x_BLD, targets_BL, reduction=reduction)


@torch.no_grad()
def initialise(name: str, weight: Tensor, *, seed: int) -> None:
    """Fills a parameter: variance kept by every matrix (std 1/√inputs), and zero for what adds to the residual stream.

    Each block begins as the identity, and the stream as the embeddings at a size that the first steps do not drown. The
    numbers follow from seed and name alone, so that a rank that holds a part of the model draws only what it holds.
    """
    if name.endswith(("o_proj.weight", "down_proj.weight", "bias", "lora_B")):
        weight.zero_()
    elif weight.dim() < 2:
        weight.fill_(1.0)
    elif weight.device.type != "meta":
        generator = torch.Generator(weight.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        weight.normal_(std=1 / math.sqrt(weight.shape[1]), generator=generator)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
