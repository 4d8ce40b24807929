"""Makes small random LoRA adapters for the tiny packages: by the PEFT library, or quickly in its layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_packages import config

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(package: Path, root: Path, *, seed: int, merged: Path, **changes: object) -> Path:
    """An adapter at `root`, and the package that PEFT makes of it and its model."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **changes}))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.15)
    model.save_pretrained(root)
    model.merge_and_unload().save_pretrained(merged)
    for path in package.iterdir():
        if not (merged / path.name).exists():
            (merged / path.name).write_bytes(path.read_bytes())
    return root


def write_adapter(root: Path, *, seed: int, **shape: object) -> Path:
    """An adapter of the queries' and the last matrices, for a tiny package of this shape."""
    root.mkdir(parents=True, exist_ok=True)
    c, g, weights = config(**shape), torch.Generator().manual_seed(seed), {}
    sizes = {
        "self_attn.q_proj": (c["hidden_size"], c["hidden_size"]),
        "mlp.down_proj": (c["hidden_size"], c["intermediate_size"]),
    }
    for layer in range(c["num_hidden_layers"]):
        for module, (outputs, inputs) in sizes.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{key}.lora_A.weight"] = torch.randn(4, inputs, generator=g) * 0.15
            weights[f"{key}.lora_B.weight"] = torch.randn(outputs, 4, generator=g) * 0.15
    save_file(weights, root / "adapter_model.safetensors", metadata={"format": "pt"})
    (root / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return root
