"""A model package as one ONNX graph, for runtimes without Python: `python -m trainer.onnx MODEL FILE.onnx`."""

import os
from pathlib import Path
from typing import Any

import torch

from trainer.errors import Refused, run_program
from trainer.log import Log
from trainer.model import Decoder
from trainer.package import load_package

_USAGE = "Usage: python -m trainer.onnx MODEL FILE.onnx"


def export_onnx(model: Decoder, path: Path) -> None:
    """Writes `tokens` (batch, length) int64 → `logits` (batch, length, vocabulary or classes) float32, both sizes free.

    Weights of more than 2 GB go to `<path>.data` beside it. Raises Refused where the libraries are absent.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        fix = "Install them: pip install onnx onnxscript."
        raise Refused("ONNX export needs onnx and onnxscript", where=str(error.name), fix=fix) from None
    tokens = torch.zeros(2, min(8, model.config.max_context), dtype=torch.int64)
    most = model.config.max_context
    sizes: Any = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=most)}
    beside = path.with_name(f".{path.name}.partial")
    try:
        with torch.inference_mode():
            program = torch.onnx.export(
                model.eval(),
                (tokens,),
                input_names=["tokens"],
                output_names=["logits"],
                dynamic_shapes=(sizes,),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(beside), external_data=False)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise Refused("name a model package and a file", where="command line", fix=_USAGE)
    source, target = map(Path, arguments)
    export_onnx(load_package(source), target)
    Log().emit("artifact", kind="model", path=str(target))


if __name__ == "__main__":
    run_program(main)
