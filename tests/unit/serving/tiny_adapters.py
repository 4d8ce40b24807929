"""Makes small random LoRA adapters for the tiny packages, by the PEFT library itself."""

from pathlib import Path

import torch

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(package: Path, root: Path, *, seed: int, merged: Path | None = None, **changes: object) -> Path:
    """An adapter at `root`; and, where asked for, the package that PEFT makes of both."""
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
    if merged is not None:
        whole = model.merge_and_unload()
        whole.save_pretrained(merged)
        for path in package.iterdir():
            if not (merged / path.name).exists():
                (merged / path.name).write_bytes(path.read_bytes())
    return root
