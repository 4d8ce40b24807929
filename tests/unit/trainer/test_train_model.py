"""The model is Transformers' Llama: same logits from the exported package, whatever the shape; and it learns."""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import ModelConfig, OptimConfig
from trainer.data import Dataset
from trainer.errors import Refused
from trainer.export import export_package
from trainer.model import Decoder, rope_tables, turn
from trainer.optim import learning_rate, make_optimizer
from trainer.package import load_package

SHAPES = {
    "tied, grouped": {"heads": 4, "kv_heads": 2, "tied_embeddings": True},
    "untied, one key head": {"heads": 4, "kv_heads": 1, "tied_embeddings": False},
    "own head width and base": {"heads": 4, "kv_heads": 4, "head_dim": 10, "rope_theta": 5e5, "norm_eps": 1e-6},
}


def make_model(vocab_size: int, **shape) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"layers": 2, "hidden": 32, "ffn": 48, "max_context": 64, **shape})
    model = Decoder(config, vocab_size=vocab_size)
    for parameter in model.parameters():  # at the size of a trained model's, so that a difference would show
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_transformers_gives_the_same_logits(dataset, tmp_path, shape):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = Dataset.open(dataset)
    model = make_model(opened.vocab_size, **shape)
    export_package(model, opened, tmp_path / "model", provenance={})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens = torch.randint(0, opened.vocab_size, (3, 64))
    assert (model(tokens) - theirs(tokens).logits).abs().max() <= 1e-4
    assert (load_package(tmp_path / "model")(tokens) - model(tokens)).abs().max() == 0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "def f(x):\n    return 'é' * x  # 日本"
    assert tokenizer(text)["input_ids"] == opened.tokenizer().encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a\nb"
    assert theirs.generation_config.eos_token_id == opened.end_of_text


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "no model package"),
        (
            lambda d: (d / "config.json").write_text(json.dumps({"model_type": "bert"})),
            "type 'bert', not llama, mistral, qwen2, qwen3",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x00" * 99), "cannot be read"),
        (lambda d: (d / "model.safetensors").unlink(), "cannot be read"),
    ],
)
def test_a_package_that_is_not_whole_is_refused(dataset, tmp_path, spoil, said):
    opened = Dataset.open(dataset)
    export_package(make_model(opened.vocab_size, heads=2, kv_heads=2), opened, tmp_path / "model", provenance={})
    spoil(tmp_path / "model")
    with pytest.raises(Refused, match=said):
        load_package(tmp_path / "model")


@torch.inference_mode()
def test_no_token_sees_a_later_one():
    model = make_model(50, heads=4, kv_heads=2)
    tokens = torch.randint(0, 50, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


@given(shift=st.integers(0, 40), first=st.integers(0, 10), second=st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_rotary_scores_depend_on_distance_alone(shift, first, second):
    config = ModelConfig(layers=1, hidden=16, heads=1, kv_heads=1, ffn=1, max_context=64)
    cos, sin = rope_tables(config)
    torch.manual_seed(0)
    q, k = torch.randn(16), torch.randn(16)

    def score(at_q: int, at_k: int) -> float:
        return float(turn(q, cos[at_q], sin[at_q]) @ turn(k, cos[at_k], sin[at_k]))

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=1e-4)


def test_an_untrained_model_knows_nothing_and_a_trained_one_its_text():
    torch.manual_seed(0)
    config = ModelConfig(layers=2, hidden=32, heads=2, kv_heads=1, ffn=64, max_context=32, tied_embeddings=False)
    model = Decoder(config, vocab_size=64)
    tokens = torch.randint(0, 64, (2, 33))
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(64), abs=1.0)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5


def test_matrices_decay_and_gains_do_not():
    model = make_model(50, heads=2, kv_heads=2)
    decayed, kept = make_optimizer(model, OptimConfig(lr=1e-3, weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert sum(map(len, (decayed["params"], kept["params"]))) == len(list(model.parameters()))


@given(steps=st.integers(2, 500), warmup=st.integers(0, 100), ratio=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_rate_rises_to_lr_and_falls_to_min_lr(steps, warmup, ratio):
    warmup = min(warmup, steps - 1)
    config = OptimConfig(lr=1e-3, min_lr=ratio * 1e-3, warmup_steps=warmup)
    rates = [learning_rate(step, steps=steps, config=config) for step in range(steps)]
    assert max(rates) == pytest.approx(config.lr)
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[warmup:]))
    if steps - warmup > 1:
        assert rates[-1] == pytest.approx(config.min_lr, abs=1e-12)
