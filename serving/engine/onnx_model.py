"""A model as an ONNX graph, run by ONNX Runtime: `--engine onnx` serves the package's `model.onnx`.

The graph has the names that Optimum gives (docs/contracts.md): new tokens, their positions, and the keys and values of
those before go in; logits and the keys and values of all come out. It stands where the torch model stands, over the
same paged cache: the past of a step's sequences is gathered for it, and what it adds to them is stored. What it cannot
do (embeddings, adapters, other forms of weights) is refused.
"""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from serving.engine.adapters import Adapters
from serving.engine.attention import KVPool, StepAttention
from serving.engine.block_manager import BlockManager
from serving.engine.messages import AdapterRef
from serving.engine.model_runner import ModelRunner
from serving.engine.parts import BLOCK_SIZE, STEP_TOKENS, Parts, checked_model_len, num_blocks_of, peaks_of, spill_of
from serving.engine.scheduler import Scheduled
from serving.engine.usage import Usage, Work
from serving.errors import Refused
from serving.model.config import ModelConfig
from serving.model.lora import Lora
from serving.settings import Settings

if TYPE_CHECKING:
    import onnxruntime

FILES = ("model.onnx", "onnx/model.onnx")  # the latter is where Optimum puts it
EXPORT = "Export it: python -m trainer.onnx MODEL MODEL/model.onnx"
IDS = ("input_ids", "attention_mask", "position_ids")
KINDS = ("key", "value")


class Call(NamedTuple):
    """Sequences that the graph computes together: rows [start, stop) of the flat batch, `tokens` of each."""

    start: int
    stop: int
    tokens: int
    rows: Tensor | None  # of their past in the cache; None where there is none


class OnnxModel:
    compute_dtype = torch.float32

    def __init__(self, session: "onnxruntime.InferenceSession", config: ModelConfig) -> None:
        self.session, self.config = session, config
        self._present = [f"present.{layer}.{kind}" for layer in range(config.layers) for kind in KINDS]

    def __call__(self, ids_N: Tensor, _cos: Tensor, _sin: Tensor, attend: StepAttention) -> Tensor:
        """Logits, N × V: what others compute from a state, a graph gives at once."""
        found = torch.empty(len(ids_N), self.config.vocab_size)
        for call in _calls(attend):
            logits, *present = self.session.run(["logits", *self._present], self._feeds(ids_N, attend, call))
            found[call.start : call.stop] = _tensor(logits).flatten(0, 1)
            new = [_tensor(each)[:, :, -call.tokens :].transpose(1, 2).flatten(0, 1) for each in present]
            for layer in range(self.config.layers):
                attend.write(layer, call.start, call.stop, new[2 * layer], new[2 * layer + 1])
        return found

    def logits(self, x_NV: Tensor) -> Tensor:
        return x_NV

    def _feeds(self, ids_N: Tensor, attend: StepAttention, call: Call) -> dict[str, object]:
        ids_BT = ids_N[call.start : call.stop].view(-1, call.tokens)
        positions_BT = torch.from_numpy(attend.positions[call.start : call.stop]).view(-1, call.tokens)
        past = [attend.pool.past(layer, call.rows, len(ids_BT)) for layer in range(self.config.layers)]
        # The past of each sequence, of what lies in its blocks behind that nothing, and all that is new.
        seen_BP = torch.arange(past[0][0].shape[2]) < positions_BT[:, :1]
        mask_BS = torch.cat((seen_BP, torch.ones_like(ids_BT, dtype=torch.bool)), dim=1).long()
        feeds = dict(zip(IDS, (ids_BT, mask_BS, positions_BT), strict=True))
        for layer, pair in enumerate(past):
            feeds |= {f"past_key_values.{layer}.{kind}": each for kind, each in zip(KINDS, pair, strict=True)}
        return {name: each.numpy() for name, each in feeds.items()}


def _tensor(value: object) -> Tensor:
    return torch.from_numpy(np.asarray(value))


def _calls(attend: StepAttention) -> Iterator[Call]:
    for group in attend.decodes:
        yield Call(group.start, group.stop, 1, group.rows)
    for chunk in attend.chunks:
        yield Call(chunk.start, chunk.stop, chunk.stop - chunk.start, chunk.rows)


class NoAdapting:
    """The server lets no adapter near a graph (see settings)."""

    value_bytes = 4

    def read(self, ref: AdapterRef) -> Lora:
        raise Refused("an ONNX graph takes no adapters", where=str(ref.root), fix="Serve with --engine torch")

    def attach(self) -> None:
        raise AssertionError("nothing was read")

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
    device, dtype = torch.device("cpu"), torch.float32
    num_blocks = num_blocks_of(settings, config, device=device, dtype=dtype, max_model_len=max_model_len)
    pool = KVPool(
        layers=config.layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, kv_heads=config.kv_heads,
        head_dim=config.head_dim, dtype=dtype, device=device,
    )  # fmt: skip
    spill = spill_of(settings, root, pool, num_blocks=num_blocks, layout=f"onnx {dtype}")
    return Parts(
        runner=ModelRunner(OnnxModel(session, config), pool, max_model_len=max_model_len),  # pyright: ignore[reportArgumentType]
        blocks=BlockManager(num_blocks=num_blocks, block_size=BLOCK_SIZE, spill=spill),
        adapters=Adapters(NoAdapting(), max_count=settings.max_adapters, max_bytes=settings.adapter_bytes),
        usage=Usage(Work.of(config, form="float32", dtype=dtype), peaks_of(settings, device)),
        step_tokens=STEP_TOKENS["cpu"],
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
    """Raises `Refused` for a graph of other inputs or outputs, or of another model's sizes."""
    heads, width = config.kv_heads, config.head_dim
    each = range(config.layers)
    expected: dict[str, tuple[str, tuple[int | None, ...]]] = dict.fromkeys(IDS, ("tensor(int64)", (None, None)))
    for way in ("past_key_values", "present"):
        expected |= {f"{way}.{i}.{kind}": ("tensor(float)", (None, heads, None, width)) for i in each for kind in KINDS}
    expected["logits"] = ("tensor(float)", (None, None, config.vocab_size))
    found = {one.name: (one.type, tuple(one.shape)) for one in (*session.get_inputs(), *session.get_outputs())}
    for name, (kind, sizes) in expected.items():
        there = found.pop(name, None)
        if there is None:
            raise Refused(f"the graph has no '{name}'", where=where, fix=EXPORT)
        named = [a for a, b in zip(there[1], sizes, strict=False) if isinstance(a, int) and b not in (None, a)]
        if there[0] != kind or len(there[1]) != len(sizes) or named:
            raise Refused(f"'{name}' is {there[0]}{[*there[1]]}, not {kind}{[*sizes]}", where=where, fix=EXPORT)
    unknown = [one.name for one in session.get_inputs() if one.name in found]
    if unknown:
        raise Refused(f"the graph asks for '{unknown[0]}'", where=where, fix=EXPORT)
