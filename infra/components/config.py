"""The stack that Pulumi's configuration describes."""

import json
from pathlib import Path
from typing import Any

import pulumi

from infra.spec import Stack, parse, read

HERE = "slipway-render"


def stack_from_config(directory: Path) -> Stack:
    """The checked stack of the running program, whose stack files lie in `directory`. Raises `StackError`, with lines.

    The engine hands values over by key, so keys that no stack has are looked for in the file.
    """
    path = stack_path(directory)
    config = pulumi.Config("slipway")
    found = {key: _value(config.get(key)) for key in Stack.model_fields}
    values = {key: value for key, value in found.items() if value is not None}
    if path.is_file():
        values |= {key: value for key, value in read(path).items() if key not in Stack.model_fields}
    return parse(values, path=path)


def stack_path(directory: Path) -> Path:
    """The running program's stack file: the engine's own, in `directory`, or the one that is rendered."""
    rendered = pulumi.Config(HERE).get("file")
    return Path(rendered) if rendered else directory / f"Pulumi.{pulumi.get_stack()}.yaml"


def runs_here() -> bool:
    """Whether the program's objects run as processes of this machine, which `slipway local` says when it renders them."""
    return bool(pulumi.Config(HERE).get_bool("here"))


def _value(text: str | None) -> Any:
    """Structured values arrive as JSON; what is not JSON is a plain string."""
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError:
        return text
