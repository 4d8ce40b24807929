"""The model computes what Transformers computes, for every family that is served."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_packages import make_package

from serving.engine.attention import KVPool, StepAttention
from serving.engine.attention_cpu import CpuPool
from serving.engine.engine import Engine
from serving.engine.messages import SamplingParams
from serving.engine.scheduler import Scheduled
from serving.engine.sequence import Sequence
from serving.errors import Refused
from serving.kernels.cpu import Kernels, kernels
from serving.model.config import ModelConfig
from serving.model.llama import Linear, Llama
from serving.model.packed import PackedBlocks, pack
from serving.model.quantized import GROUP, quantize, quantize_layers
from serving.model.rope import rope_table
from serving.model.weights import load
from serving.settings import Settings

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32}
SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-3.1-rope": (
        "Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 16}},
    ),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "qwen2-yarn-rope": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3-yarn-rope": ("Qwen3", {"head_dim": 128, "rope_parameters": {**YARN, "beta_fast": 8, "truncate": False}}),
    "llama-yarn-rope": ("Llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}  # fmt: skip


def read(root: Path) -> Llama:
    config = ModelConfig.read(root / "config.json")
    return load(root, config, device=torch.device("cpu"), dtype=torch.float32, on_bytes=lambda *_: None)


def forward(model: Llama, ids: list[int]) -> torch.Tensor:
    """Logits of all positions, computed as one prompt by way of the paged cache."""
    c = model.config
    pool = KVPool(
        layers=c.layers, num_blocks=8, block_size=16, kv_heads=c.kv_heads, head_dim=c.head_dim,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    seq = Sequence(0, ids, SamplingParams(max_tokens=1), decode=lambda _: "", arrived_s=0.0)
    seq.block_table = list(range(8))
    cos, sin = rope_table(c, positions=128)
    with torch.inference_mode():
        attend = StepAttention(pool, [Scheduled(seq, len(ids))])
        return model.logits(model(torch.tensor(ids), cos[: len(ids)], sin[: len(ids)], attend))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    import transformers

    name, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, "pad_token_id": 0, **changes})
    reference = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # norms and biases too, which start as ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.2)
    reference.save_pretrained(tmp_path)
    ids = torch.randint(0, 128, (1, 100)).tolist()[0]
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    model = read(tmp_path)
    difference = (forward(model, ids) - expected).abs().max()
    assert difference <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, pad_token_id=0)).eval()
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = read(tmp_path)
    ids = [1, 2, 3]
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    assert torch.allclose(forward(model, ids), expected, atol=1e-4)


def test_yarn_serves_the_context_that_it_makes(tmp_path: Path) -> None:
    root = make_package(tmp_path / "p")
    config = json.loads((root / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": config["max_position_embeddings"]}
    (root / "config.json").write_text(json.dumps({**config, "rope_parameters": {**yarn, "rope_theta": 1e6}}))
    assert ModelConfig.read(root / "config.json").max_positions == 4 * config["max_position_embeddings"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e9}}, "is no size"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "yarn needs a rope_theta above 1"),
        ({"intermediate_size": 256}, "shape"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "no place"),
        ({"hidden_size": "wide"}, "cannot be read"),
        ({"num_attention_heads": 0}, "0 is no size"),
        ({"num_hidden_layers": 10**9}, "is no size"),
        ({"vocab_size": float("inf")}, "inf is no size"),
        ({"rms_norm_eps": float("nan")}, "nan is no number"),
        ({"head_dim": 15}, "15 values of a head"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "kind of layer"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: dict, says: str, tmp_path: Path) -> None:
    root = make_package(tmp_path / "p")
    (root / "config.json").write_text(json.dumps({**json.loads((root / "config.json").read_text()), **change}))
    with pytest.raises(Refused, match=says):
        read(root)


def test_weights_that_give_no_numbers_are_refused_at_load(tmp_path: Path) -> None:
    """As of a training that diverged: each answer would be the same token, and the server would call itself ready."""
    root = make_package(tmp_path / "p")
    weights = load_file(root / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(weights, root / "model.safetensors")
    with pytest.raises(Refused, match="no numbers"):
        Engine.load(root, Settings(model=str(root), kv_bytes=1 << 22)).warm_up()


def test_a_truncated_weight_file_is_refused_by_name(tmp_path: Path) -> None:
    root = make_package(tmp_path / "p")
    data = (root / "model.safetensors").read_bytes()
    (root / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(Refused, match=r"model\.safetensors"):
        read(root)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantized_layers_compute_with_the_rounded_weights(form: str, tmp_path: Path) -> None:
    """In torch and in the compiled kernels: the logits are those of a model whose weights were rounded before."""
    root = make_package(tmp_path / "p")
    ids = list(range(1, 60))
    rounded, in_torch = read(root), read(root)
    for module in rounded.blocks.modules():
        if isinstance(module, Linear):
            codes, scales = quantize(module.weight, form)
            module.weight.copy_(codes * scales.repeat_interleave(GROUP, -1))
    expected = forward(rounded, ids)
    quantize_layers(in_torch, form=form)
    assert torch.allclose(forward(in_torch, ids), expected, atol=1e-4)
    assert (expected - forward(read(root), ids)).abs().max() > 1e-3
    found = kernels()
    if isinstance(found, Kernels):
        compiled = read(root)
        pack(compiled, found, form=form)
        assert torch.allclose(forward(compiled, ids), expected, atol=1e-3)


def test_packed_weights_give_the_logits_of_torch(tmp_path: Path) -> None:
    found = kernels()
    if not isinstance(found, Kernels):
        pytest.skip(f"no compiled kernels here: {found}")
    for changes in ({}, {"tie_word_embeddings": False}):
        root = make_package(tmp_path / str(len(changes)), **changes)
        ids = list(range(1, 100))
        expected, compiled = forward(read(root), ids), read(root)
        pack(compiled, found, form="float32")
        assert torch.allclose(forward(compiled, ids), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_in_one_call_equal_layers_one_by_one_to_the_bit(family: str, tmp_path: Path) -> None:
    """So that a request's answer is the same whether or not another one of the batch has an adapter."""
    import transformers

    found = kernels()
    if not isinstance(found, Kernels):
        pytest.skip(f"no compiled kernels here: {found}")
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, "head_dim": 16, "pad_token_id": 0, **changes})
    reference = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    reference.save_pretrained(tmp_path)
    model = read(tmp_path)
    c, ids = model.config, torch.arange(1, 51)
    in_torch = forward(read(tmp_path), ids.tolist())
    pack(model, found, form="float32")
    seq = Sequence(0, ids.tolist(), SamplingParams(max_tokens=1), decode=lambda _: "", arrived_s=0.0)
    seq.block_table = [3, 0, 2, 1]
    cos, sin = (table[:50] for table in rope_table(c, positions=50))
    shape = {"layers": c.layers, "num_blocks": 4, "kv_heads": c.kv_heads, "head_dim": c.head_dim}
    answers = []
    for layers in (model.blocks, super(PackedBlocks, model.blocks)):
        attend = CpuPool(found, **shape, dtype=torch.float32).plan([Scheduled(seq, 50)])
        answers.append(model.norm(layers.forward(model.embed(ids), cos, sin, attend)))
    assert torch.equal(*answers)
    assert (model.logits(answers[0]) - in_torch).abs().max() <= 1e-4 * max(1.0, float(in_torch.abs().max()))
