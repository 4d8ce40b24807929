"""A model as an ONNX graph, run by ONNX Runtime: `--engine onnx` serves the package's `model.onnx`.

The graph maps whole sequences, int64 batch × length, to logits, batch × length × vocabulary, and keeps nothing between
steps: each token is computed from the whole text before it. It stands where the torch model stands, between the same
scheduler and the same sampler; what it "computes" for a position are its logits at once. What it cannot do is refused.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from serving.engine.adapters import Adapters
from serving.engine.attention import positions_of
from serving.engine.block_manager import BlockManager
from serving.engine.messages import AdapterRef
from serving.engine.model_runner import ModelRunner
from serving.engine.parts import Parts, checked_model_len, peaks_of
from serving.engine.scheduler import Scheduled
from serving.engine.usage import Usage, Work
from serving.errors import Refused
from serving.model.config import ModelConfig
from serving.model.lora import Lora
from serving.settings import Settings

if TYPE_CHECKING:
    import onnxruntime

FILES = ("model.onnx", "onnx/model.onnx")  # the latter is where Optimum puts it
LOGITS_BYTES = 256 << 20  # of one call: sequences beyond that are run in the next
SHORTEST = 2  # tokens: what graphs are exported for at least
EXPORT = "Export it: python -m trainer.onnx MODEL MODEL/model.onnx"


class WholeSequences:
    """The step's plan: there is no cache to attend to, so it is the sequences themselves."""

    def __init__(self, batch: Seq[Scheduled]) -> None:
        self.batch, self.positions = batch, positions_of(batch)

    def __call__(self, _layer: int, *_qkv: Tensor) -> Tensor:
        raise AssertionError("a graph attends by itself")


class NoPool:
    """In the place of the cache's memory, which a graph has none of."""

    layers: list[Tensor] = []  # noqa: RUF012 (never written)
    device = torch.device("cpu")

    def plan(self, batch: Seq[Scheduled]) -> WholeSequences:
        return WholeSequences(batch)


class OnnxModel:
    compute_dtype = torch.float32

    def __init__(self, session: "onnxruntime.InferenceSession", config: ModelConfig) -> None:
        self.session, self.config = session, config
        self._input = session.get_inputs()[0].name
        self._output = session.get_outputs()[0].name

    def __call__(self, ids_N: Tensor, _cos: Tensor, _sin: Tensor, attend: WholeSequences) -> Tensor:
        """N × V. Rows that nobody asks for (a chunk's, before its prompt is whole) are zero."""
        found = torch.zeros(len(ids_N), self.config.vocab_size)
        asked, end = [], 0
        for item in attend.batch:
            start, end = end, end + item.num_tokens
            if item.completes or item.seq.params.prompt_logprobs:
                asked.append((item.seq.num_computed + item.num_tokens, start, item))
        asked.sort(key=lambda one: -one[0])
        while asked:
            longest = max(asked[0][0], SHORTEST)
            count = max(1, LOGITS_BYTES // (longest * self.config.vocab_size * 4))
            some, asked = asked[:count], asked[count:]
            tokens = np.zeros((len(some), longest), dtype=np.int64)  # padding follows the text, which never looks ahead
            for row, (length, _, item) in enumerate(some):
                tokens[row, :length] = item.seq.token_ids[:length]
            logits = np.asarray(self.session.run([self._output], {self._input: tokens})[0])
            for row, (length, start, item) in enumerate(some):
                found[start : start + item.num_tokens] = torch.from_numpy(
                    logits[row, length - item.num_tokens : length]
                )
        return found

    def logits(self, x_NV: Tensor) -> Tensor:
        return x_NV


class NoAdapting:
    """The server lets no adapter near a graph (see settings)."""

    value_bytes = 4

    def read(self, ref: AdapterRef) -> Lora:
        raise Refused("an ONNX graph takes no adapters", where=str(ref.root), fix="Serve with --engine torch")

    def group(self, batch: Seq[Scheduled], loras: Mapping[AdapterRef, Lora]) -> None:
        assert not loras or not batch


def onnx_parts(root: Path, config: ModelConfig, settings: Settings, *, on_bytes: Callable[[int, int], None]) -> Parts:
    """The parts of an engine that runs the package's graph. Raises `Refused`."""
    path = next((root / name for name in FILES if (root / name).is_file()), None)
    if path is None:
        raise Refused("model.onnx is missing", where=str(root), fix=EXPORT)
    total_bytes = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    on_bytes(0, total_bytes)
    session = _session(path, settings)
    _check_signature(session, config, where=str(path))
    on_bytes(total_bytes, total_bytes)
    max_model_len = checked_model_len(settings, config, where=str(root))
    model = OnnxModel(session, config)
    peaks = peaks_of(settings, torch.device("cpu"))
    return Parts(
        runner=ModelRunner(model, NoPool(), max_model_len=max_model_len),  # pyright: ignore[reportArgumentType]
        # A block is a whole sequence, so that none is ever shared: there is nothing in it. One for each that runs, and
        # one that the scheduler leaves free for each.
        blocks=BlockManager(num_blocks=2 * settings.max_num_seqs, block_size=max_model_len),
        adapters=Adapters(NoAdapting(), max_count=settings.max_adapters, max_bytes=settings.adapter_bytes),
        usage=Usage(Work.of(config, form="float32", dtype=torch.float32), peaks),
        step_tokens=settings.max_num_seqs * max_model_len,
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
        embeds=False,
    )


def _session(path: Path, settings: Settings) -> "onnxruntime.InferenceSession":
    try:
        import onnxruntime
    except ImportError:
        fix = "Install onnxruntime, or serve with --engine torch"
        raise Refused("the package onnxruntime is missing", where="--engine onnx", fix=fix) from None
    provider = "CUDAExecutionProvider"
    there = provider in onnxruntime.get_available_providers()
    if settings.device == "cuda" and not there:
        raise Refused("this ONNX Runtime has no CUDA", where="--device cuda", fix="Install onnxruntime-gpu") from None
    providers = [provider] * (there and settings.device != "cpu") + ["CPUExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # the library raises kinds of its own for what is wrong with a file
        raise Refused(f"the graph cannot be read: {error}", where=str(path), fix=EXPORT) from None


def _check_signature(session: "onnxruntime.InferenceSession", config: ModelConfig, *, where: str) -> None:
    inputs = [(one.type, len(one.shape)) for one in session.get_inputs()]
    out = session.get_outputs()
    classes = out[0].shape[-1] if len(out) == 1 and len(out[0].shape) == 3 else None
    if inputs != [("tensor(int64)", 2)] or (classes != config.vocab_size and not isinstance(classes, str)):
        names = ", ".join(f"{one.name} {one.type}{one.shape}" for one in [*session.get_inputs(), *out])
        what = f"the graph is not tokens (batch, length) → logits (batch, length, {config.vocab_size}), but {names}"
        raise Refused(what[:600], where=where, fix=EXPORT)
