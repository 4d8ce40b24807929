"""From a `Pulumi.<stack>.yaml` to a `Stack`: every error names the file, the line, the key and the fix."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from infra.spec.base import Misplaced, Unplannable
from infra.spec.document import Document, DocumentError, Loc, read_document
from infra.spec.stack import Stack
from infra.spec.wording import say

NAMESPACE, PREFIX = "slipway", "slipway:"


class StackError(ValueError):
    """A stack file that cannot be used. The message is made for people: one line an error."""


def load(path: Path) -> Stack:
    """Read, check and freeze a stack file. Raises `StackError`."""
    return parse(read(path), path=path)


def read(path: Path) -> dict[str, Any]:
    """The `slipway:` keys of a stack file, without the prefix. Raises `StackError` for what is no stack file."""
    document = _document(path)
    config = cast(Any, document.values).get("config") if isinstance(document.values, dict) else None
    if not isinstance(config, dict):
        raise StackError(f"{path}: no `config:` mapping; a stack's values stand under `config:` as `slipway:KEY`")
    found: dict[str, Any] = {}
    for key, value in cast(dict[Any, Any], config).items():
        namespace, colon, name = str(key).partition(":")
        if not colon or (namespace != NAMESPACE and get_close_matches(namespace.lower(), [NAMESPACE], cutoff=0.8)):
            # The engine takes a key without a namespace for the project's; another reader would pass it over.
            line = document.lines.get(("config", str(key)), 1)
            raise StackError(f"{path}:{line}: {key}: unknown key; did you mean `{PREFIX}{name or namespace}`?")
        if namespace == NAMESPACE:
            found[name] = value
    return found


def _document(path: Path) -> Document:
    try:
        return read_document(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        stacks = sorted(p.name.removeprefix("Pulumi.").removesuffix(".yaml") for p in path.parent.glob("Pulumi.*.yaml"))
        raise StackError(f"{path}: no such stack file; there is {', '.join(stacks) or 'none'}") from None
    except UnicodeDecodeError as error:
        raise StackError(f"{path}: not in UTF-8 ({error.reason}, byte {error.start}); save it so") from None
    except OSError as error:
        raise StackError(f"{path}: {error.strerror}; make it a file that can be read") from None
    except DocumentError as error:
        raise StackError(f"{path}:{error.line}: not YAML as stack files have it: {error}") from None


def parse(values: Mapping[str, Any], *, path: Path) -> Stack:
    """Check the values of a stack; `path` is the file that they came from, for the line numbers in errors."""
    try:
        return Stack.model_validate(values)
    except ValidationError as error:
        lines = _lines(path)
        raise StackError("\n".join(_explain(dict(e), path=path, lines=lines) for e in error.errors())) from None


@contextmanager
def located(path: Path) -> Generator[None]:
    """What the planner finds impossible becomes a `StackError` with the line of its key in `path`, where the values have a file."""
    try:
        yield
    except Unplannable as error:
        if not path.is_file():
            raise
        line = line_finder(path)(error.where)
        raise StackError(f"{path}:{line}: {PREFIX}{error.where}: {error.message}") from None


def line_finder(path: Path) -> Callable[[str], int]:
    """Tells the line of a key, in which items of a list go by their names, or of what is around it.

    The file is read when the first line is asked for: where nothing is wrong, nobody asks.
    """
    document = cache(lambda: _document(path))
    return lambda where: _line_of(where, document())


def _line_of(where: str, document: Document) -> int:
    value, loc, line = document.values, (), 1
    for part in ("config", *f"{PREFIX}{where}".split(".")):
        if isinstance(value, list):
            items = cast(list[Any], value)
            index = next((n for n, item in enumerate(items) if isinstance(item, dict) and item.get("name") == part), -1)  # pyright: ignore[reportUnknownMemberType]
            key, value = index, items[index] if index >= 0 else None
        else:
            key, value = part, cast(Any, value).get(part) if isinstance(value, dict) else None
        loc = (*loc, key)
        if loc not in document.lines:
            break
        line = document.lines[loc]
    return line


def _explain(error: dict[str, Any], *, path: Path, lines: Mapping[Loc, int]) -> str:
    cause = error.get("ctx", {}).get("error")
    keys = cause.keys if isinstance(cause, Misplaced) else ()
    # A key that is missing, or that a sentence is about, need not be in the file; any other that is not is a union's tag.
    absent = error["loc"][-1:] if error["type"] == "missing" or not lines else keys
    loc = _in_file(error["loc"] + keys, lines, absent=absent)
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), 1)
    key = PREFIX + ".".join(str(part) for part in loc) if loc else "config"
    return f"{path}:{line}: {key}: {say(error, known=_fields_at(error['loc'][:-1]))}"


def _in_file(loc: Loc, lines: Mapping[Loc, int], *, absent: Loc) -> Loc:
    """pydantic's location without the union tags that it puts in and the file does not have."""
    kept: Loc = ()
    for part in loc:
        if (*kept, part) in lines or part in absent:
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
    """Line of every key and item under `config:`, by its location without the `slipway:` prefix."""
    try:
        found = _document(path).lines
    except StackError:
        return {}
    under = {loc[1:]: line for loc, line in found.items() if loc[0] == "config" and len(loc) > 1}
    return {(str(loc[0]).removeprefix(PREFIX), *loc[1:]): line for loc, line in under.items()}
