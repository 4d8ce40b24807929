"""The ONNX graph computes what the model does, at any batch and length."""

import numpy as np
import onnxruntime
import pytest
import torch

from trainer.config import ModelConfig
from trainer.model import Decoder
from trainer.onnx import export_onnx


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_onnx_runtime_gives_the_same_logits(family, tmp_path):
    torch.manual_seed(0)
    shape = ModelConfig(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, max_context=64, family=family)
    model = Decoder(shape, vocab_size=100).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((1, 5), (3, 64)):
        tokens = torch.randint(0, 100, (batch, length))
        (logits,) = session.run(["logits"], {"tokens": tokens.numpy()})
        with torch.inference_mode():
            assert np.abs(logits - model(tokens).numpy()).max() <= 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
