"""A loaded model for the compiled kernels: the same modules, with weights in panels and activations in float32."""

from typing import Any

import torch
from torch import Tensor, nn

from serving.engine.attention_cpu import CpuAttention
from serving.kernels.cpu import Kernels, Layer, Packed, Shape
from serving.model.config import ModelConfig
from serving.model.llama import Attend, Blocks, Linear, Llama, RMSNorm, Rotary, SwiGLU
from serving.model.lora import LoraLinear

MULTIPLE = 16  # of two vectors of AVX2, or one of AVX-512: what the kernels take at once


class PackedLinear(nn.Module):
    def __init__(self, kernels: Kernels, weight: Packed) -> None:
        super().__init__()
        self.kernels, self.weight = kernels, weight

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight)


class PackedEmbedding(nn.Module):
    """A tied model's: rows of the head's own weight."""

    def __init__(self, kernels: Kernels, weight: Packed) -> None:
        super().__init__()
        self.kernels, self.weight = kernels, weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.kernels.rows(self.weight, ids)


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


class KernelRotary(nn.Module):
    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.kernels.rotate(x, cos, sin)


class PackedBlocks(Blocks):
    """All layers in one call into the library; one by one, to the same bits, where something else has a part in them."""

    def __init__(self, blocks: Blocks, kernels: Kernels, config: ModelConfig) -> None:
        super().__init__(blocks)
        self.kernels = kernels
        self.shape = Shape(
            layers=config.layers, hidden=config.hidden, ffn=config.ffn, heads=config.heads,
            kv_heads=config.kv_heads, dim=config.head_dim, eps=config.norm_eps,
        )  # fmt: skip
        self.layers = (Layer * config.layers)(*map(_layer, blocks))

    def forward(self, x_NE: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, attend: Attend) -> Tensor:
        if not isinstance(attend, CpuAttention) or not self._alone():
            return super().forward(x_NE, cos_N1D, sin_N1D, attend)
        caches = attend.pool.layers
        self.shape.half_cache = caches[0].dtype == torch.bfloat16
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.cache = cache.data_ptr()
        return self.kernels.forward(self.shape, self.layers, attend.step, x_NE, cos_N1D, sin_N1D)

    def _alone(self) -> bool:
        """Whether the layers are as they were packed, or adapters that none of the step's sequences use stand beside."""
        linear = self[-1].get_submodule("attention.out")
        if isinstance(linear, LoraLinear) and not linear.groups.of_step:
            linear = linear.base
        return isinstance(linear, PackedLinear)


def _layer(block: Any) -> Layer:
    a, f = block.attention, block.ffn
    norms = [norm and norm.weight.data_ptr() for norm in (block.attention_norm, block.ffn_norm, a.q_norm, a.k_norm)]
    return Layer(*norms, *(linear.weight.c for linear in (a.qkv, a.out, f.gate_up, f.down)))


def fits(config: ModelConfig) -> bool:
    """Whether the kernels can compute a model of this shape."""
    return not any(size % MULTIPLE for size in (config.hidden, config.ffn, config.head_dim))


def pack(model: Llama, kernels: Kernels, *, form: str) -> str:
    """Changes the model in place, a weight at a time, and returns the form of the layers' weights (see Kernels.pack).

    The vocabulary's weight keeps the model's own precision when the others are cut to int8 or int4: it is looked up
    from, and the answer's last digits hang on it.
    """
    kept = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[model.compute_dtype]
    head = kernels.pack(model.head.weight, kept)
    embed = PackedEmbedding(kernels, head) if model.config.tied else FloatEmbedding(model.embed.weight)
    setattr(model, "embed", embed)  # noqa: B010 (a module's type is what its callers need: forward)
    setattr(model, "head", PackedLinear(kernels, head))  # noqa: B010
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, Linear):
                setattr(parent, name, PackedLinear(kernels, kernels.pack(child.weight, form, child.bias)))
            elif isinstance(child, RMSNorm):
                setattr(parent, name, KernelNorm(kernels, child.weight, child.eps))
            elif isinstance(child, SwiGLU):
                setattr(parent, name, KernelSwiGLU(kernels))
            elif isinstance(child, Rotary):
                setattr(parent, name, KernelRotary(kernels))
    setattr(model, "blocks", PackedBlocks(model.blocks, kernels, model.config))  # noqa: B010
    model.compute_dtype = torch.float32
    forms = {module.weight.form for module in model.blocks.modules() if isinstance(module, PackedLinear)}
    return form if form in forms else forms.pop()
