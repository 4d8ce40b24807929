"""From a `Pulumi.<stack>.yaml` to a `Stack`: every error names the file, the line, the key and the fix."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from infra.spec.base import Misplaced
from infra.spec.stack import Stack

PREFIX = "slipway:"
Loc = tuple[str | int, ...]


class StackError(ValueError):
    """A stack file that cannot be used. The message is made for people: one line an error."""


def load(path: Path) -> Stack:
    """Read, check and freeze a stack file. Raises `StackError`."""
    return parse(read(path), path=path)


def read(path: Path) -> dict[str, Any]:
    """The `slipway:` keys of a stack file, without the prefix. Raises `StackError` for what is no stack file."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        stacks = sorted(p.name.removeprefix("Pulumi.").removesuffix(".yaml") for p in path.parent.glob("Pulumi.*.yaml"))
        raise StackError(f"{path}: no such stack file; there is {', '.join(stacks) or 'none'}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise StackError(f"{path}: not a YAML file in UTF-8: {' '.join(str(error).split())}") from None
    config = cast(Any, document).get("config") if isinstance(document, dict) else None
    if not isinstance(config, dict):
        raise StackError(f"{path}: no `config:` mapping; a stack's values stand under `config:` as `slipway:KEY`")
    values = cast(dict[str, Any], config)
    return {key.removeprefix(PREFIX): value for key, value in values.items() if str(key).startswith(PREFIX)}


def parse(values: Mapping[str, Any], *, path: Path) -> Stack:
    """Check the values of a stack; `path` is the file that they came from, for the line numbers in errors."""
    try:
        return Stack.model_validate(values)
    except ValidationError as error:
        lines = _lines(path)
        raise StackError("\n".join(_explain(dict(e), path=path, lines=lines) for e in error.errors())) from None


def _explain(error: dict[str, Any], *, path: Path, lines: Mapping[Loc, int]) -> str:
    cause = error.get("ctx", {}).get("error")
    loc = _in_file(error["loc"] + (cause.keys if isinstance(cause, Misplaced) else ()), lines)
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), 1)
    key = PREFIX + ".".join(str(part) for part in loc) if loc else "config"
    return f"{path}:{line}: {key}: {_say(error)}"


def _say(error: dict[str, Any]) -> str:
    match error["type"]:
        case "extra_forbidden":
            known = _fields_at(error["loc"][:-1])
            near = get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
            return "unknown key; " + (f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}")
        case "missing":
            return "this key is required and not there"
        case "value_error":
            return str(error["ctx"]["error"])
        case _:
            return f"{error['msg']}, and it is {error['input']!r}"


def _in_file(loc: Loc, lines: Mapping[Loc, int]) -> Loc:
    """pydantic's location without the union tags that it puts in and the file does not have."""
    kept: Loc = ()
    for part in loc:
        if (*kept, part) in lines or part == loc[-1]:
            kept = (*kept, part)
    return kept


def _fields_at(loc: Loc) -> list[str]:
    """Names of the fields of the part of `Stack` at `loc`."""
    models: list[type[BaseModel]] = [Stack]
    for part in loc:
        if isinstance(part, int):
            continue
        inner = [
            m for model in models if part in model.model_fields for m in _models_in(model.model_fields[part].annotation)
        ]
        models = inner or models  # a union's tag is no field: stay
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _lines(path: Path) -> dict[Loc, int]:
    """Line (from 1) of every key and item under `config:`, by its location without the `slipway:` prefix."""
    try:
        root: Any = cast(Any, yaml).compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    found: dict[Loc, int] = {}

    def walk(node: Any, loc: Loc) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in cast(list[tuple[Any, Any]], node.value):
                inner = (*loc, str(key.value).removeprefix(PREFIX) if not loc else str(key.value))
                found[inner] = key.start_mark.line + 1
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(cast(list[Any], node.value)):
                found[(*loc, index)] = item.start_mark.line + 1
                walk(item, (*loc, index))

    if isinstance(root, yaml.MappingNode):
        for key, value in cast(list[tuple[Any, Any]], root.value):
            if key.value == "config":
                walk(value, ())
    return found
