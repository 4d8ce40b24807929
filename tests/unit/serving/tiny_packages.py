"""Makes small random model packages in Hugging Face layout, without any of the trainer."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "def main(argv: list[str]) -> int:\n    return 0\n",
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "naïve café — Ωμέγα, 你好，世界 🙂🚀",
]
END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_tokenizer(vocab_size: int = 384) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer


def config(**changes: object) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 384, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "eos_token_id": 0, "bos_token_id": 0, "dtype": "float32", **changes,
    }  # fmt: skip


def random_weights(c: dict, *, seed: int) -> dict[str, torch.Tensor]:
    """Wide enough that greedy answers have clear winners, so that rounding cannot change them."""
    g = torch.Generator().manual_seed(seed)
    hidden, heads, kv, ffn = (
        c["hidden_size"],
        c["num_attention_heads"],
        c["num_key_value_heads"],
        c["intermediate_size"],
    )
    d = c.get("head_dim") or hidden // heads

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g) * (2.0 / columns**0.5)

    weights = {"model.embed_tokens.weight": matrix(c["vocab_size"], hidden), "model.norm.weight": torch.ones(hidden)}
    if not c["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        weights |= {
            p + "input_layernorm.weight": 1 + 0.1 * torch.randn(hidden, generator=g),
            p + "post_attention_layernorm.weight": 1 + 0.1 * torch.randn(hidden, generator=g),
            p + "self_attn.q_proj.weight": matrix(heads * d, hidden),
            p + "self_attn.k_proj.weight": matrix(kv * d, hidden),
            p + "self_attn.v_proj.weight": matrix(kv * d, hidden),
            p + "self_attn.o_proj.weight": matrix(hidden, heads * d),
            p + "mlp.gate_proj.weight": matrix(ffn, hidden),
            p + "mlp.up_proj.weight": matrix(ffn, hidden),
            p + "mlp.down_proj.weight": matrix(hidden, ffn),
        }
    return weights


def make_package(root: Path, *, seed: int = 0, **changes: object) -> Path:
    """A whole package at `root`, whose weights and answers depend on `seed`."""
    root.mkdir(parents=True, exist_ok=True)
    c = config(**changes)
    (root / "config.json").write_text(json.dumps(c))
    save_file(random_weights(c, seed=seed), root / "model.safetensors", metadata={"format": "pt"})
    byte_level_tokenizer(c["vocab_size"] if c["vocab_size"] < 1000 else 384).save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    (root / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return root


def publish(package: Path, registry: Path, *, name: str = "tiny") -> str:
    """Copies a package into a registry as its contract says, and returns its digest."""
    files = {}
    for path in sorted(p for p in package.rglob("*") if p.is_file()):
        data = path.read_bytes()
        files[str(path.relative_to(package))] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    text = json.dumps({"files": files}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    entry = registry / "models" / name / digest
    entry.mkdir(parents=True, exist_ok=True)
    for path in files:
        (entry / path).write_bytes((package / path).read_bytes())
    (entry / "manifest.json").write_text(json.dumps({"files": files}, indent=1))
    return digest


def point(registry: Path, digest: str, *, name: str = "tiny", channel: str = "production") -> Path:
    """Moves the channel to a digest, by a rename."""
    path = registry / "models" / name / "channels" / f"{channel}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps({"digest": digest, "at": "2026-01-01T00:00:00+00:00", "history": []}))
    beside.rename(path)
    return path
