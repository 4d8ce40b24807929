"""Where the project is, and what every command needs: the stack file, the two consoles, one way to refuse."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from infra.planner import Plan, plan
from infra.spec import StackError, load, located

people = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)  # `file:100: key` is a line, and no emoji
"""People's text goes to stderr; stdout is for what the command makes."""

StackName = Annotated[
    str, typer.Option("--stack", "-s", help="Stack: the NAME in stacks/Pulumi.NAME.yaml.", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]


class Refusal(Exception):
    """What a command will not do: `error: WHAT. FIX`, exit 2."""


def root() -> Path:
    """The nearest folder upwards that has a Pulumi.yaml; else the one this package stands in. Raises `Refusal`."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).parents[2]):
        if (folder / "Pulumi.yaml").is_file() and (folder / "stacks").is_dir():
            return folder
    raise Refusal("no Pulumi.yaml with a stacks/ folder here or above. Fix: run this inside a Slipway checkout")


def stack_file(stack: str) -> Path:
    """The stack's file, relative to the working directory where that is shorter to read."""
    path = root() / "stacks" / f"Pulumi.{stack}.yaml"
    if not path.is_file():
        there = sorted(p.name.removeprefix("Pulumi.").removesuffix(".yaml") for p in path.parent.glob("Pulumi.*.yaml"))
        raise StackError(f"stack {stack!r} does not exist; there is {', '.join(there) or 'none'}")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def planned(file: Path) -> Plan:
    """The plan of a stack file. Raises StackError, with the line of what cannot be."""
    with located(file):
        return plan(load(file))


def me() -> str:
    """This program, as a person types it here: `slipway` where it is on PATH, else the way to it."""
    program = Path(sys.argv[0]).absolute()
    found = shutil.which(program.name)
    return program.name if found and Path(found).absolute() == program else os.path.relpath(program)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(document, indent=2, sort_keys=False, default=str, allow_nan=False))
