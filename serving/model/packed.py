"""A loaded model for the compiled kernels: the same modules, with weights in panels and activations in float32."""

import torch
from torch import Tensor, nn

from serving.kernels.cpu import Kernels, Packed
from serving.model.config import ModelConfig
from serving.model.llama import Linear, Llama, RMSNorm, SwiGLU

MULTIPLE = 16  # of two vectors of AVX2, or one of AVX-512: what the kernels take at once


class PackedLinear(nn.Module):
    def __init__(self, kernels: Kernels, weight: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.kernels, self.weight, self.bias = kernels, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.kernels.linear(x, self.weight)
        return y if self.bias is None else y.add_(self.bias)


class PackedEmbedding(nn.Module):
    """A tied model's: rows of the head's own weight."""

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids)


class FloatEmbedding(nn.Module):
    """An untied model's: it stays as it is, and gives float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float()


class KernelNorm(nn.Module):
    def __init__(self, kernels: Kernels, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.kernels, self.weight, self.eps = kernels, weight.float(), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x.reshape(-1, len(self.weight)), self.weight, self.eps).view(x.shape)


class KernelSwiGLU(nn.Module):
    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def forward(self, gate_up: Tensor) -> Tensor:
        return self.kernels.silu_multiply(gate_up)


def fits(config: ModelConfig) -> bool:
    """Whether the kernels can compute a model of this shape."""
    return not any(size % MULTIPLE for size in (config.hidden, config.ffn, config.head_dim))


def pack(model: Llama, kernels: Kernels, *, form: str) -> None:
    """Changes the model in place, a weight at a time: no more than one of them is in memory twice.

    The vocabulary's weight keeps the model's own precision when the others are cut to int8 or int4: it is looked up
    from, and the answer's last digits hang on it.
    """
    kept = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[model.compute_dtype]
    head = kernels.pack(model.head.weight, kept)
    embed = PackedEmbedding(head) if model.config.tied else FloatEmbedding(model.embed.weight)
    setattr(model, "embed", embed)  # noqa: B010 (a module's type is what its callers need: forward)
    setattr(model, "head", PackedLinear(kernels, head, None))  # noqa: B010
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, Linear):
                bias = None if child.bias is None else child.bias.float()
                setattr(parent, name, PackedLinear(kernels, kernels.pack(child.weight, form), bias))
            elif isinstance(child, RMSNorm):
                setattr(parent, name, KernelNorm(kernels, child.weight, child.eps))
            elif isinstance(child, SwiGLU):
                setattr(parent, name, KernelSwiGLU(kernels))
    model.compute_dtype = torch.float32
