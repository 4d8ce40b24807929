"""A Llama-family decoder (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

There is no parallel code here: `parallel.py` applies it from outside. The names of the parameters are those of the
Hugging Face layout, so that a state dict is a model package's content as it stands.
Sizes in shapes: B sequences, L positions, D hidden, H heads, K key/value heads, W width of a head, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, computed in float32 whatever the dtype of the input."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        x = x_BLD.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(x_BLD.dtype)


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of every position, each (max_context, W), for the halves convention of `turn`.

    The first half of the sines is negative: the turn of (a, b) is (a·cos - b·sin, b·cos + a·sin), which is then
    x·cos + swap(x)·sin with no negation on the way.
    """
    width = config.head_width
    frequencies = config.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(config.max_context, dtype=torch.float64), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).float(), torch.cat([-sin, sin], -1).float()


def turn(x_BHLW: Tensor, cos_LW: Tensor, sin_LW: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021); pairs are (i, i + W/2), as Hugging Face's Llama has them."""
    first, second = x_BHLW.chunk(2, -1)
    return (x_BHLW * cos_LW + torch.cat((second, first), -1) * sin_LW).to(x_BHLW.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width, self.grouped = config.head_width, config.kv_heads != config.heads
        self.q_proj = nn.Linear(config.hidden, config.heads * self.width, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(config.heads * self.width, config.hidden, bias=False)

    def forward(self, x_BLD: Tensor, cos_LW: Tensor, sin_LW: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.width)).transpose(1, 2)

        q_BHLW = turn(heads(self.q_proj(x_BLD)), cos_LW, sin_LW)
        k_BKLW = turn(heads(self.k_proj(x_BLD)), cos_LW, sin_LW)
        v_BKLW = heads(self.v_proj(x_BLD))
        y_BHLW = F.scaled_dot_product_attention(q_BHLW, k_BKLW, v_BKLW, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(y_BHLW.transpose(1, 2).flatten(2))


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

    def forward(self, x_BLD: Tensor, cos_LW: Tensor, sin_LW: Tensor) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos_LW, sin_LW)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, eps=config.norm_eps)
        cos_LW, sin_LW = rope_tables(config)
        self.cos_LW: Tensor
        self.sin_LW: Tensor
        self.register_buffer("cos_LW", cos_LW, persistent=False)
        self.register_buffer("sin_LW", sin_LW, persistent=False)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        length = tokens_BL.shape[1]
        cos_LW, sin_LW = self.cos_LW[:length], self.sin_LW[:length]
        x_BLD = self.embed_tokens(tokens_BL)
        for layer in self.layers:
            x_BLD = layer(x_BLD, cos_LW, sin_LW)
        return self.norm(x_BLD)


class Decoder(nn.Module):
    """Tokens in, logits out; with targets, the loss instead."""

    def __init__(self, config: ModelConfig, *, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.model = Backbone(config, vocab_size=vocab_size)
        self.lm_head = nn.Linear(config.hidden, vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._initialise()

    def _initialise(self) -> None:
        """Variance kept by every matrix (std 1/√inputs), and zero for what adds to the residual stream.

        Each block begins as the identity, and the stream as the embeddings at a size that the first steps do not drown.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))

    def forward(self, tokens_BL: Tensor, targets_BL: Tensor | None = None) -> Tensor:
        """Logits (B, L, V); given targets, the mean cross-entropy in nats instead."""
        logits_BLV = self.lm_head(self.model(tokens_BL))
        if targets_BL is None:
            return logits_BLV
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten())


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
