"""`slipway local secret`: values of the Secrets that a stack names, for `slipway local up`; a cluster has its own."""

import getpass
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.project import AsJson, Refusal, StackName, me, people, print_json
from infra.local import Secrets
from infra.local.secrets import MOST_BYTES
from infra.spec import Stack

app = typer.Typer(
    help="Secrets that the stack names, on this machine: files of yours, outside of the checkout, that nobody else may read.",
    no_args_is_help=True,
)
KEYS_FILE = "keys.json"
Name = Annotated[str, typer.Argument(help="The Secret, as the stack file names it.")]


def secrets_of(stack: str) -> Secrets:
    """The user's Secrets for a stack."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()
    return Secrets(Path(home) / "slipway" / "secrets" / stack, f"{me()} local secret set -s {stack}")


@app.command(name="set")
def set_value(
    name: Name,
    key: Annotated[str, typer.Argument(help="Its key: `keys.json` of API keys, a variable of training's secret.")],
    stack: StackName = "local",
) -> None:
    """Keep a value, read from stdin (a terminal is asked for it, and does not show it). A line's end at its end is left off."""
    asked = sys.stdin.isatty()
    value = getpass.getpass(f"{key} of {name}: ").encode() if asked else sys.stdin.buffer.read(MOST_BYTES + 2)
    try:
        path = secrets_of(stack).set(name, key, value.removesuffix(b"\n").removesuffix(b"\r"))
    except OSError as error:
        raise Refusal(f"{error.strerror} ({error.filename}). Fix: make it writable, or set XDG_CONFIG_HOME") from None
    people.print(f"kept: {path}", markup=False)


@app.command(name="list")
def list_names(stack: StackName = "local", json: AsJson = False) -> None:
    """Secrets and their keys; never a value."""
    secrets = secrets_of(stack)
    found = {name: secrets.keys(name) for name in secrets.names()}
    if json:
        print_json({"stack": stack, "secrets": found})
        return
    for name, keys in found.items():
        people.print(f"{name}: {', '.join(keys)}", markup=False)


@app.command()
def remove(name: Name, stack: StackName = "local") -> None:
    """Forget a Secret, with all its keys."""
    if not secrets_of(stack).remove(name):
        raise Refusal(f"there is no Secret {name!r} for stack {stack}. Fix: {me()} local secret list -s {stack}")
    people.print(f"{name} is removed", markup=False)


def require_api_keys(spec: Stack, stack: str) -> Secrets:
    """The stack's Secrets here. Raises `Refusal` with the command that makes API keys where a service asks for them."""
    secrets = secrets_of(stack)
    for service in spec.services:
        name = service.api_keys_secret
        if name and KEYS_FILE not in secrets.keys(name):
            make = f"""(echo '{{"keys": ['; {sys.executable} -m serving.auth me; echo ']}}') | {secrets.command} {name} {KEYS_FILE}"""
            raise Refusal(f"no {KEYS_FILE} of Secret {name!r} on this machine (services.{service.name}). Fix: {make}")
    return secrets
