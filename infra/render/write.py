"""Manifests as files: one object a file, the same bytes for the same stack, and none left over from the render before."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from infra.render.program import Rendered, RenderError
from infra.spec.document import Dumper

Json = dict[str, Any]
# What must be there before what lives in it; the rest is applied in any order.
FIRST = {
    "Namespace": 0,
    "EC2NodeClass": 1,
    "NodePool": 2,
    "ServiceAccount": 3,
    "PersistentVolumeClaim": 4,
    "ConfigMap": 5,
}
LAST = 9
INDEX = ".slipway-render.json"
"""Names of the files of a render: those, and no others, may be removed by the next one."""


def write(rendered: Rendered, out: Path) -> list[Path]:
    """Write `rendered` to the directory `out`; returns the manifests' paths. Raises RenderError where it cannot."""
    files = files_of(rendered)
    try:
        out.mkdir(parents=True, exist_ok=True)
        stale = _written_before(out) - files.keys()
        # The index first, with the old names and the new: a render that is cut off leaves nothing that no one owns.
        _replace(out / INDEX, _json(sorted(stale | files.keys())))
        for name, text in files.items():
            _replace(out / name, text)
        for name in sorted(stale):
            (out / name).unlink(missing_ok=True)
        _replace(out / INDEX, _json(sorted(files)))
    except OSError as error:
        raise RenderError(f"{error.strerror} ({error.filename or out}); give another directory") from None
    return [out / name for name in files if name.endswith(".yaml")]


def files_of(rendered: Rendered) -> dict[str, str]:
    """File name → text."""
    files = {_name(manifest): _yaml(manifest) for manifest in rendered.manifests}
    outputs = dict(rendered.outputs)
    plan = {"plan": outputs.pop("plan", {}), "findings": outputs.pop("findings", [])}
    return files | {"plan.json": _json(plan | {"outputs": outputs, "images": list(rendered.images)})}


def _name(manifest: Json) -> str:
    return f"{FIRST.get(manifest['kind'], LAST)}0-{manifest['kind'].lower()}-{manifest['metadata']['name']}.yaml"


def _yaml(manifest: Json) -> str:
    """`apiVersion`, `kind` and `metadata` first, as people read them; below, keys in order."""
    head = {key: _whole(manifest[key]) for key in ("apiVersion", "kind", "metadata")}
    rest = {key: _whole(manifest[key]) for key in sorted(manifest.keys() - head.keys())}
    return yaml.dump(head | rest, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)


def _json(value: Any) -> str:
    return json.dumps(_whole(value), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _whole(value: Any) -> Any:
    """Keys in order; and whole numbers as such, which Pulumi's wire format carries as floats."""
    if isinstance(value, dict):
        return {key: _whole(value[key]) for key in sorted(value)}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list):
        return [_whole(inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _written_before(out: Path) -> set[str]:
    """Plain names in the index of an earlier render."""
    try:
        names = json.loads((out / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return set()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}


def _replace(path: Path, text: str) -> None:
    """Whole or not at all; an unchanged file keeps its time."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
