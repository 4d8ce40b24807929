"""`slipway cluster`: a Kubernetes to try things on. The user's own, kind's where Docker is, else one node of this machine."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from infra.apply import ApiError
from infra.cli.project import AsJson, Refusal, me, people, print_json
from infra.clouds import local as clusters
from infra.local.locks import held

app = typer.Typer(
    help="A Kubernetes cluster on this machine: yours (--kubeconfig), kind's where Docker is, else a node of its own.",
    no_args_is_help=True,
)
Kubeconfig = Annotated[
    Path | None,
    typer.Option("--kubeconfig", help="Use this file's cluster, and make none.", exists=True, dir_okay=False),
]


@app.command()
def up(
    kubeconfig: Kubeconfig = None,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs that a node says it has: scheduled, not there.")] = 4,
    add_ons: Annotated[
        list[clusters.AddOn] | None,
        typer.Option("--with", help="An add-on that stacks may need. Repeat for several."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Have a cluster that is ready: names, volumes, metrics of pods, network policies. Again with --with adds to it.

    The first time Kubernetes is built from its Go modules, which takes minutes; then it is up in seconds. Needs root, Go and
    Debian, or Docker. Nothing is installed: programs go to ~/.cache/slipway, the cluster to ~/.local/state/slipway.
    """
    places = clusters.Places.of_user()
    with _errors(), _alone(places):
        found = clusters.up(places, kubeconfig=kubeconfig, gpus=gpus, add_ons=add_ons or [], say=sayer())
    if json:
        print_json(asdict(found))
        return
    _tell(found)
    if kubeconfig is None:
        people.print(f"export KUBECONFIG={found.kubeconfig}", markup=False)


@app.command()
def down(json: AsJson = False) -> None:
    """Remove the cluster, in whatever state: its processes, mounts, interfaces, rules and files. The cache is kept."""
    places = clusters.Places.of_user()
    with _errors(), _alone(places):
        was_there = clusters.down(places, say=sayer())
    if json:
        print_json({"was_there": was_there})
    else:
        people.print("the cluster is down" if was_there else "there is no cluster")


@app.command()
def status(kubeconfig: Kubeconfig = None, json: AsJson = False) -> None:
    """What there is, and what is not ready. Exit 1 when no cluster answers."""
    with _errors():
        found = clusters.status(clusters.Places.of_user(), kubeconfig)
    if json:
        print_json(asdict(found))
    else:
        _tell(found)
    if not found.up:
        sys.exit(1)


def sayer() -> Callable[[str], None]:
    """Lines of progress for people, each with the seconds since the start."""
    started = time.monotonic()
    return lambda text: people.print(f"[dim]{time.monotonic() - started:4.0f} s[/]  {escape(text)}")


def _tell(found: clusters.Status) -> None:
    if found.up:
        what = {"node": "a node of this machine", "kind": "kind", "kubeconfig": str(found.kubeconfig)}[
            found.how or "node"
        ]
        gpus = f" · {found.gpus} GPUs to schedule, none to compute" if found.gpus else ""
        people.print(f"Kubernetes {found.version} on {what} · {found.nodes_ready} ready{gpus}")
        people.print(f"network policies are {found.network_policies}")
        if found.add_ons:
            people.print(f"with {', '.join(found.add_ons)}")
    else:
        people.print(f"no cluster answers. Fix: {me()} cluster up")
    for line in found.waiting:
        people.print(f"[yellow]waiting:[/] {escape(line)}")


@contextmanager
def _alone(places: clusters.Places) -> Generator[None]:
    """One `up` or `down` at a time."""
    places.cache.mkdir(parents=True, exist_ok=True)
    with held(places.cache / "cluster.lock") as ours:
        if not ours:
            raise Refusal("another `slipway cluster` is at work. Fix: wait for it to end")
        yield


@contextmanager
def _errors() -> Generator[None]:
    try:
        yield
    except clusters.Unable as error:
        raise Refusal(str(error)) from None
    except (clusters.ClusterError, ApiError) as error:
        people.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(1)
