"""Weight-only quantisation with torch alone: on a GPU, and the reference of the compiled kernels' formats on a CPU.

A group of inputs shares a scale; a weight is its code times the scale, and is widened when its layer runs. So memory
shrinks to a half or a quarter of bfloat16's, and the products are those of the activations' own type.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.model.config import ModelConfig
from serving.model.llama import Linear, Llama

GROUP = 32  # inputs that share a scale
CODE_MAX = {"int8": 127.0, "int4": 7.0}


def quantizable(config: ModelConfig) -> bool:
    return not any(size % GROUP for size in (config.hidden, config.ffn, config.heads * config.head_dim))


def quantize(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Codes (int8, like `weight`) and scales (float32, … × inputs / GROUP): a group's largest is the largest code."""
    grouped = weight.float().unflatten(-1, (-1, GROUP))
    scales = grouped.abs().amax(-1, keepdim=True) / CODE_MAX[form]
    codes = (grouped / scales.clamp(min=1e-30)).round().clamp(-CODE_MAX[form], CODE_MAX[form])
    return codes.flatten(-2).to(torch.int8), scales.squeeze(-1)


class QuantizedLinear(nn.Module):
    def __init__(self, linear: Linear, form: str) -> None:
        super().__init__()
        self.codes, self.scales = quantize(linear.weight, form)
        self.halves = form == "int4"
        if self.halves:  # two codes a byte, each plus 8
            low, high = (self.codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
            self.codes = low | high << 4
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes
        if self.halves:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
        weight = codes.unflatten(-1, (-1, GROUP)) * self.scales.to(x.dtype).unsqueeze(-1)
        return F.linear(x, weight.flatten(-2), self.bias)


def quantize_layers(model: Llama, *, form: str) -> None:
    """Changes the layers of `model` in place. The vocabulary's weight stays: the answer's last digits hang on it."""
    for parent in [*model.blocks.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, Linear):
                setattr(parent, name, QuantizedLinear(child, form))
