"""A model package as one ONNX graph, for runtimes without Python: `python -m trainer.onnx MODEL FILE.onnx`.

The graph of a language model takes what came before as keys and values, under the names that Optimum, transformers.js
and ONNX Runtime's own tools use (docs/contracts.md): who answers token by token computes each of them once.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import Parser, Refused, run_program
from trainer.log import Log
from trainer.model import Block, Decoder
from trainer.package import load_package

Cache = list[tuple[Tensor, Tensor]]  # of each layer its keys and values, B × K × positions × W


class CachedDecoder(nn.Module):
    """A `Decoder` that goes on from a cache. P positions are in it, and L are new."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids_BL: Tensor, attention_mask_BS: Tensor, position_ids_BL: Tensor, past: Cache
    ) -> tuple[Tensor, Cache]:
        """Logits (B, L, V) and the cache with the new positions, S = P + L of them.

        `attention_mask_BS` is 0 where the cache holds nothing that counts. A position sees those before it, as they
        lie in the cache, and itself; how far on in its text it is, `position_ids_BL` says.
        """
        backbone = self.decoder.model
        cos_B1LW, sin_B1LW = (
            F.embedding(position_ids_BL, table).unsqueeze(1) for table in (backbone.cos_LW, backbone.sin_LW)
        )
        at_S = torch.arange(attention_mask_BS.shape[1])
        before_LS = at_S <= at_S[attention_mask_BS.shape[1] - input_ids_BL.shape[1] :].unsqueeze(1)
        mask_B1LS = before_LS & attention_mask_BS.bool()[:, None, None, :]
        x_BLD, present = backbone.embed_tokens(input_ids_BL), []
        for block, (k_BKPW, v_BKPW) in zip(backbone.layers, past, strict=True):
            assert isinstance(block, Block)
            attention = block.self_attn
            q_BHLW, k_BKLW, v_BKLW = attention.split(block.input_layernorm(x_BLD), cos_B1LW, sin_B1LW)
            k_BKSW, v_BKSW = torch.cat((k_BKPW, k_BKLW), dim=2), torch.cat((v_BKPW, v_BKLW), dim=2)
            present.append((k_BKSW, v_BKSW))
            x_BLD = x_BLD + attention.join(attention.attend(q_BHLW, k_BKSW, v_BKSW, mask_B1LS))
            x_BLD = x_BLD + block.mlp(block.post_attention_layernorm(x_BLD))
        return self.decoder.head(backbone.norm(x_BLD)), present


def export_onnx(model: Decoder, path: Path) -> None:
    """Writes a language model's graph with its cache; of a classifier `tokens` (batch, length) → `logits` of each position.

    Weights of more than 2 GB go to `<path>.data` beside it. Raises Refused where the libraries are absent.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        fix = "Install them: pip install onnx onnxscript."
        raise Refused("ONNX export needs onnx and onnxscript", where=str(error.name), fix=fix) from None
    graph = _with_cache(model) if model.labels is None else _of_tokens(model)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with torch.inference_mode():
            program = torch.onnx.export(**graph, dynamo=True, verbose=False)
        assert program is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(beside), external_data=False)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _with_cache(model: Decoder) -> dict[str, Any]:
    """What `torch.onnx.export` is to be called with; the example's sizes are all different, and none is 0 or 1."""
    config = model.config
    batch, length, past = 2, 3, 5
    ids = torch.zeros(batch, length, dtype=torch.int64)
    seen = torch.ones(batch, past + length, dtype=torch.int64)
    free = torch.export.Dim.DYNAMIC
    layers = range(config.layers)
    cache = [tuple(torch.zeros(batch, config.kv_heads, past, config.head_width) for _ in "kv") for _ in layers]
    caches = {
        way: [f"{way}.{i}.{kind}" for i in layers for kind in ("key", "value")]
        for way in ("past_key_values", "present")
    }
    return {
        "model": CachedDecoder(model).eval(),
        "args": (ids, seen, ids + past, cache),
        "input_names": ["input_ids", "attention_mask", "position_ids", *caches["past_key_values"]],
        "output_names": ["logits", *caches["present"]],
        "dynamic_shapes": (*([{0: free, 1: free}] * 3), [({0: free, 2: free}, {0: free, 2: free}) for _ in layers]),
    }


def _of_tokens(model: Decoder) -> dict[str, Any]:
    most = model.config.max_context
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=most)}
    return {
        "model": model.eval(),
        "args": (torch.zeros(2, min(8, most), dtype=torch.int64),),
        "input_names": ["tokens"],
        "output_names": ["logits"],
        "dynamic_shapes": (sizes,),
    }


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m trainer.onnx")
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model package")
    parser.add_argument("graph", type=Path, metavar="FILE.onnx", help="where the graph goes")
    options = parser.parse_args(arguments)
    export_onnx(load_package(options.model), options.graph)
    Log().emit("artifact", kind="model", path=str(options.graph))


if __name__ == "__main__":
    run_program(main)
