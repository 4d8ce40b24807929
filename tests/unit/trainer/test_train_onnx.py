"""The ONNX graphs compute what the models do: at any batch and length, and token by token from a cache."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from trainer.config import ModelConfig
from trainer.model import Decoder
from trainer.onnx import export_onnx

SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "max_context": 64}


def make_model(*, labels: int | None = None, **changes: object) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**{**SHAPE, **changes}), vocab_size=100, labels=labels).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def session_of(model: Decoder, folder: Path) -> onnxruntime.InferenceSession:
    export_onnx(model, folder / "model.onnx")
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model(family="qwen3")


@pytest.fixture(scope="module")
def session(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    return session_of(model, tmp_path_factory.mktemp("onnx"))


def test_a_graph_goes_on_from_its_cache(model: Decoder, session: onnxruntime.InferenceSession) -> None:
    """Two texts of unequal length, the shorter one padded on the left: a chunk, another, then token by token."""
    names = [output.name for output in session.get_outputs()]
    tokens = torch.randint(0, 100, (2, 20))
    pad = np.array([[0], [3]])  # of the second text's row
    with torch.inference_mode():
        expected = [model(tokens[:1]).numpy()[0], model(tokens[1:, 3:]).numpy()[0]]
    past = {name.replace("present", "past_key_values"): np.zeros((2, 2, 0, 8), np.float32) for name in names[1:]}
    for start, stop in ((0, 7), (7, 16), (16, 17), (17, 18), (18, 20)):
        ids = {
            "input_ids": tokens[:, start:stop].numpy(),
            "attention_mask": (np.arange(stop) >= pad).astype(np.int64),
            "position_ids": np.maximum(np.arange(start, stop) - pad, 0),
        }
        logits, *present = session.run(names, {**ids, **past})
        past = dict(zip(past, present, strict=True))
        for row, first in enumerate((start, max(start, 3))):
            found, wanted = np.asarray(logits)[row, first - start :], expected[row][first - 3 * row : stop - 3 * row]
            assert np.abs(found - wanted).max() <= 1e-3


def test_one_row_and_one_token_are_sizes_too(model: Decoder, session: onnxruntime.InferenceSession) -> None:
    empty = {one.name: np.zeros((1, 2, 0, 8), np.float32) for one in session.get_inputs()[3:]}
    one = np.ones((1, 1), np.int64)
    logits = session.run(["logits"], {"input_ids": one, "attention_mask": one, "position_ids": 0 * one, **empty})[0]
    with torch.inference_mode():
        assert np.abs(logits - model(torch.ones(1, 1, dtype=torch.int64)).numpy()).max() <= 1e-3


def test_a_classifier_takes_tokens_alone(tmp_path: Path) -> None:
    model = make_model(labels=3, layers=1)
    session = session_of(model, tmp_path)
    for batch, length in ((1, 5), (3, 64)):
        tokens = torch.randint(0, 100, (batch, length))
        (logits,) = session.run(["logits"], {"tokens": tokens.numpy()})
        with torch.inference_mode():
            assert np.abs(logits - model(tokens).numpy()).max() <= 1e-3
