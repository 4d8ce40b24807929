"""`slipway apply` and `slipway destroy`: a stack on a live cluster, by server-side apply, where there is no Pulumi CLI."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from infra import apply as live
from infra.cli.cluster import sayer
from infra.cli.project import AsJson, StackName, me, people, print_json, stack_file
from infra.clouds.local import Places
from infra.spec import load

Json = dict[str, Any]
Kubeconfig = Annotated[
    Path | None,
    typer.Option(
        "--kubeconfig",
        help="The cluster. Default: KUBECONFIG, else the one of `slipway cluster up`, else ~/.kube/config.",
        envvar="KUBECONFIG",
    ),
]


def apply(
    stack: StackName = "dev",
    kubeconfig: Kubeconfig = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait at most for Jobs and Deployments; 0: do not wait.")
    ] = 0,
    json: AsJson = False,
) -> None:
    """Bring the stack to a cluster: what it declares is made so, what it no longer declares is removed.

    The same objects as `pulumi up` makes and `slipway render` writes. A stack that a check refuses changes nothing.
    """
    from infra.render import render  # Pulumi's import takes a second

    rendered = render(stack_file(stack), None)
    with _errors():
        cluster = live.Cluster(_cluster(kubeconfig))
        done = live.apply(cluster, rendered.manifests, stack=stack)
        if not json:
            _tell(done)
        if wait:
            live.settle(cluster, rendered.manifests, within_s=wait, say=sayer())
    if json:
        print_json({"stack": stack, "settled": bool(wait)} | {name: _names(keys) for name, keys in vars(done).items()})
    elif wait:
        people.print(f"{stack} is settled")
    else:
        people.print(f"applied; nothing is waited for. See: {me()} apply -s {stack} --wait 900")


def destroy(
    stack: StackName = "dev",
    kubeconfig: Kubeconfig = None,
    volumes: Annotated[
        bool, typer.Option("--volumes", help="Remove namespace and volumes too: datasets, checkpoints, registry.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Remove the stack from a cluster. Its volumes are kept, unless told otherwise."""
    namespace = load(stack_file(stack)).platform.namespace
    with _errors():
        removed = live.destroy(live.Cluster(_cluster(kubeconfig)), stack=stack, namespace=namespace, volumes=volumes)
    if json:
        print_json({"stack": stack, "removed": _names(removed), "volumes_removed": volumes})
    else:
        people.print(f"removed {len(removed)} objects" if removed else f"{stack} is not on this cluster")


def _cluster(kubeconfig: Path | None) -> Path | None:
    ours = Places.of_user().kubeconfig
    return kubeconfig or (ours if ours.exists() else None)


def _tell(done: live.Applied) -> None:
    for keys, sign, style in ((done.created, "+", "green"), (done.changed, "~", "yellow"), (done.removed, "-", "red")):
        for name in _names(keys):
            people.print(f"[{style}]{sign}[/] {escape(name)}")
    people.print(
        f"{len(done.created)} created, {len(done.changed)} changed, "
        f"{len(done.removed)} removed, {len(done.unchanged)} as they were"
    )


def _names(keys: list[live.Key]) -> list[str]:
    return [f"{kind.lower()}/{name}" for _, kind, _, name in keys]


@contextmanager
def _errors() -> Generator[None]:
    try:
        yield
    except (live.ApiError, live.Unsettled) as error:
        people.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)
