"""Run the Pulumi program of a stack in this process, under Pulumi's own test runtime, and take down what it declares."""

import asyncio
import json
import runpy
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pulumi
from pulumi.runtime import mocks, rpc, settings
from pulumi.runtime.config import set_all_config
from pulumi.runtime.stack import run_in_stack

from infra.spec import load, read

Json = dict[str, Any]
PROGRAM = Path(__file__).parents[2] / "stacks"
KUBERNETES = "kubernetes:"


class RenderError(ValueError):
    """What the program declares cannot be written as manifests."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    manifests: tuple[Json, ...]
    """Kubernetes objects, by kind, namespace and name."""
    outputs: Json = field(default_factory=dict[str, Any])
    """The program's outputs: `endpoint`, `jobs`, `channels`, `plan`, `findings`."""
    images: tuple[Json, ...] = ()
    """Images that `pulumi up` builds: `{"tags": […], "dockerfile": …}`."""


def run(stack_file: Path, *, here: bool = False) -> Rendered:
    """The objects that the program declares for `stack_file`. Raises `StackError`, `Refused`, `RenderError`."""
    load(stack_file)  # errors that name this very file, before the program starts
    values = {f"slipway:{key}": json.dumps(value) for key, value in read(stack_file).items()}
    values["slipway-render:file"] = str(stack_file)
    if here:
        values["slipway-render:here"] = "true"
    stack = stack_file.name.removeprefix("Pulumi.").removesuffix(".yaml")
    recorder = _Recorder()
    try:
        # One event loop for all: Pulumi's futures belong to the loop that is current when they are made.
        asyncio.run(_run(recorder, stack=stack, config=values))
    except pulumi.RunError as error:
        raise error.__cause__ or error from None
    manifests = sorted(recorder.manifests, key=_order)
    _refuse_twins(manifests)
    images = sorted(recorder.images, key=lambda image: image["dockerfile"])
    return Rendered(manifests=tuple(manifests), outputs=recorder.outputs, images=tuple(images))


async def _run(recorder: "_Recorder", *, stack: str, config: dict[str, str]) -> None:
    _forget()
    mocks.set_mocks(recorder, project="slipway", stack=stack, preview=False, monitor=_Monitor(recorder))
    # The test runtime comes with a root of its own; a program that runs as a whole makes one.
    settings.set_root_resource(None)  # pyright: ignore[reportArgumentType]
    set_all_config(config)

    def program() -> None:
        runpy.run_path(str(PROGRAM), run_name="__main__")

    try:
        await run_in_stack(program)
    finally:
        _forget()


def _forget() -> None:
    """Leave nothing of a run to the next one in this process."""
    state = cast(Any, settings.SETTINGS)  # its attributes are context variables, which Pulumi leaves untyped
    state.rpc_manager.clear()
    state.outputs.clear()
    settings.set_root_resource(None)  # pyright: ignore[reportArgumentType]
    # `runpy` puts the program's directory on the path.
    while str(PROGRAM) in sys.path:
        sys.path.remove(str(PROGRAM))


class _Recorder(mocks.Mocks):
    """Takes every resource down, and answers as if it had been made."""

    def __init__(self) -> None:
        self.manifests: list[Json] = []
        self.images: list[Json] = []
        self.outputs: Json = {}

    def call(self, args: mocks.MockCallArgs) -> tuple[Json, list[tuple[str, str]] | None]:
        raise RenderError(f"the program asks the cloud for {args.token}, which a render cannot")

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str | None, Json]:
        inputs = cast(Json, args.inputs)  # pyright: ignore[reportUnknownMemberType]
        if args.typ.startswith(KUBERNETES):
            _refuse_secrets(inputs, where=f"{args.typ} {args.name}")
            self.manifests.append(inputs)
        elif args.typ.startswith("docker-build:"):
            dockerfile = Path(inputs["dockerfile"]["location"])
            image = {"tags": inputs["tags"], "dockerfile": f"{dockerfile.parent.name}/{dockerfile.name}"}
            self.images.append(image | {"build_args": inputs["buildArgs"]})
        return args.name, inputs


class _Monitor(mocks.MockMonitor):
    """Pulumi's mock monitor, which takes down the stack's outputs too."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__(recorder)
        self.recorder = recorder

    def RegisterResourceOutputs(self, request: Any) -> Any:
        if request.urn.split("::")[2] == "pulumi:pulumi:Stack":
            outputs: Json = rpc.deserialize_properties(request.outputs)
            _refuse_secrets(outputs, where="the outputs")
            self.recorder.outputs.update(outputs)
        return cast(Any, super()).RegisterResourceOutputs(request)


def _refuse_secrets(value: Any, *, where: str) -> None:
    """Manifests are committed and copied: a secret has no place in them."""
    if rpc.is_rpc_secret(value):
        raise RenderError(f"a secret value in {where}: manifests would show it; name a Secret that is in the cluster")
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    elif isinstance(value, list):
        inner = value  # pyright: ignore[reportUnknownVariableType]
    for part in inner:
        _refuse_secrets(part, where=where)


def _order(manifest: Json) -> tuple[str, str, str]:
    metadata = manifest["metadata"]
    return manifest["kind"], metadata.get("namespace", ""), metadata["name"]


def _refuse_twins(manifests: list[Json]) -> None:
    for one, other in pairwise(manifests):
        if _order(one) == _order(other):
            kind, _, name = _order(one)
            raise RenderError(
                f"two objects would be {kind}/{name}; rename the service or the node pool that is called so"
            )
