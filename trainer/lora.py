"""LoRA (Hu et al. 2021): small matrices beside frozen ones, trained alone, merged or kept apart at the end."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import LoraConfig
from trainer.model import Decoder, initialise


class LoraLinear(nn.Linear):
    """y = x·Wᵀ + b + (α/r)·x·Aᵀ·Bᵀ. B begins as zero, so that the model begins as it was."""

    def __init__(self, inner: nn.Linear, config: LoraConfig) -> None:
        device = inner.weight.device
        super().__init__(inner.in_features, inner.out_features, bias=inner.bias is not None, device="meta")
        self.weight, self.bias = inner.weight, inner.bias
        self.scale = config.alpha / config.rank
        self.lora_A = nn.Parameter(torch.empty(config.rank, inner.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(inner.out_features, config.rank, device=device))

    def forward(self, input: Tensor) -> Tensor:
        small = F.linear(F.linear(input, self.lora_A), self.lora_B)
        return F.linear(input, self.weight, self.bias) + self.scale * small


def add_lora(model: Decoder, config: LoraConfig) -> None:
    """Puts adapters beside the matrices that the config names and freezes all else but a classifier's head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("score."))
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if last in config.targets and isinstance(module, nn.Linear):
            setattr(model.get_submodule(name.rpartition(".")[0]), last, LoraLinear(module, config))
    seed = torch.initial_seed()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A") and parameter.device.type != "meta":
            initialise(name, parameter, seed=seed)


def merged(weight: Tensor, a: Tensor, b: Tensor, *, config: LoraConfig) -> Tensor:
    """The matrix that computes what the adapted one does."""
    return weight + (config.alpha / config.rank) * (b.float() @ a.float()).to(weight.dtype)


def peft_config(config: LoraConfig, *, base: str | None, classifies: bool) -> dict[str, Any]:
    """`adapter_config.json` of the PEFT library, which vLLM reads too."""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(config.targets),
        "modules_to_save": ["score"] if classifies else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def peft_name(name: str) -> str:
    """`model.layers.0.….q_proj.lora_A` as PEFT has it."""
    return f"base_model.model.{name}.weight" if "lora_" in name else f"base_model.model.{name}"
