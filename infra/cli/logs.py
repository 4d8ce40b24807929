"""`slipway logs`: what the programs of a live stack write, wherever it runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from infra.cli.apply import Kubeconfig
from infra.cli.local import INTERRUPTED
from infra.cli.project import AsJson, StackName, print_json, stack_file
from infra.cli.target import cluster_of, local_state, told
from infra.live import snapshot
from infra.live.logs import chosen, lines_of
from infra.local import client
from infra.spec import load


def logs(
    component: Annotated[
        str | None,
        typer.Argument(help="`data`, `train`, `promote`, `router`, a service, a workload or a pod. All without one."),
    ] = None,
    stack: StackName = "dev",
    kubeconfig: Kubeconfig = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    tail: Annotated[
        int, typer.Option("--tail", min=1, help="Lines of each container, from the end (of a cluster).")
    ] = 200,
    json: AsJson = False,
) -> None:
    """Print the log lines of a stack's programs: of one that `slipway local up` runs here, or of the cluster."""
    spec = load(stack_file(stack))
    namespace = spec.platform.namespace
    state = local_state(stack, kubeconfig)
    try:
        with told(stack, namespace):
            if state:
                for name in _here(state, component):
                    for line in client.logs(state, name, follow=follow):
                        _print(line.pod, line.container, line.text, json=json)
                return
            cluster = cluster_of(kubeconfig)
            pods = chosen(snapshot(cluster, namespace), component)
            for line in lines_of(cluster, pods, follow=follow, tail=tail):
                _print(line.pod, line.container, line.text, json=json)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _here(state: Path, component: str | None) -> list[str]:
    """Workloads of this machine that a component's name means; the name itself where it is a workload's or a pod's."""
    workloads = [workload.name for workload in client.status(state).workloads]
    if component is None:
        return workloads
    return [name for name in workloads if name == component or name.startswith(f"{component}-")] or [component]


def _print(pod: str, container: str, text: str, *, json: bool) -> None:
    if json:
        print_json({"pod": pod, "container": container, "text": text})
    else:
        typer.echo(f"{pod} {container} {text}")
