"""The forward pass of Llama, Mistral, Qwen2 and Qwen3, over a flat batch of tokens from any mix of sequences.

Shapes: N tokens of the step, E hidden, H query heads, K key-value heads, D head size, F feed-forward, V vocabulary.
Nothing here knows sequences, blocks or devices: attention over the cache is the `Attend` that the caller passes.
Query, key and value share one matrix, and so do gate and up, since three small products cost more than one.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.model.config import ModelConfig


class Attend(Protocol):
    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Stores the new keys and values, and returns each token's attention over its own sequence, as N × H·D."""
        ...


class Linear(nn.Module):
    """`nn.Linear` without its random initialisation, whose meta-device version takes seconds to import."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rotary(nn.Module):
    def forward(self, x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
        return torch.addcmul(x_NHD * cos_N1D, x_NHD.roll(x_NHD.shape[-1] // 2, -1), sin_N1D)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, config.heads, config.kv_heads, config.head_dim
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden, width, bias=config.qkv_bias)
        self.out = Linear(config.heads * config.head_dim, config.hidden, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.rotary = Rotary()

    def forward(self, x_NE: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, attend: Attend) -> Tensor:
        qkv = self.qkv(x_NE).view(len(x_NE), -1, self.head_dim)
        qk, v_NKD = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.heads, self.kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q_NHD, k_NKD = self.rotary(qk, cos_N1D, sin_N1D).split((self.heads, self.kv_heads), dim=1)
        return self.out(attend(self.layer, q_NHD, k_NKD, v_NKD))


class SwiGLU(nn.Module):
    """silu(gate) · up, where a row is gate and then up. Source: GLU variants (arXiv 2002.05202)."""

    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden, 2 * config.ffn, bias=config.mlp_bias)
        self.activation = SwiGLU()
        self.down = Linear(config.ffn, config.hidden, bias=config.mlp_bias)

    def forward(self, x_NE: Tensor) -> Tensor:
        return self.down(self.activation(self.gate_up(x_NE)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x_NE: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, attend: Attend) -> Tensor:
        x_NE = x_NE + self.attention(self.attention_norm(x_NE), cos_N1D, sin_N1D, attend)
        return x_NE + self.ffn(self.ffn_norm(x_NE))


class Blocks(nn.ModuleList):
    def forward(self, x_NE: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, attend: Attend) -> Tensor:
        for block in self:
            x_NE = block(x_NE, cos_N1D, sin_N1D, attend)
        return x_NE


class Llama(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32  # of activations; weights may be smaller
        self.embed = Embedding(config.vocab_size, config.hidden)
        self.blocks = Blocks(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = Linear(config.hidden, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids_N: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the last norm, N × E."""
        return self.norm(self.blocks(self.embed(ids_N), cos_N1D, sin_N1D, attend))

    def logits(self, x_NE: Tensor) -> Tensor:
        """N × V in float32. Only rows that are sampled from come here: the vocabulary's product is the largest."""
        return self.head(x_NE).float()
