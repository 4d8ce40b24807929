"""`slipway status`: a live stack in people's words: what runs, what waits and why, and where it differs from its file."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from infra import live
from infra.apply import Cluster, Unsettled, settle
from infra.cli import local
from infra.cli.apply import Kubeconfig
from infra.cli.cluster import sayer
from infra.cli.project import AsJson, StackName, me, people, print_json, stack_file
from infra.cli.target import cluster_of, local_state, told
from infra.spec import load

Json = dict[str, Any]
COLOURS = {"ready": "green", "done": "green", "failing": "bold red", "full": "yellow", "waiting": "yellow"}


def status(
    stack: StackName = "dev",
    kubeconfig: Kubeconfig = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="First wait, these seconds at most, for Jobs and Deployments.")
    ] = 0,
    drift: Annotated[
        bool, typer.Option("--drift/--no-drift", help="Hold what is there against what the stack file declares.")
    ] = True,
    json: AsJson = False,
) -> None:
    """Say how a live stack is doing: roll-outs, training, autoscaling, what is Pending and why, drift.

    Of a stack that `slipway local up` runs here, or of the cluster. Exits 1 when something of it fails, or with --wait when it is
    not settled in time: after `pulumi up`, what `slipway apply --wait` does by itself.
    """
    spec = load(stack_file(stack))
    if local_state(stack, kubeconfig):
        local.status(stack, json)
        return
    namespace = spec.platform.namespace
    with told(stack, namespace):
        cluster = cluster_of(kubeconfig)
        declared = _declared(stack) if wait or drift else ()
        unsettled = _waited(cluster, declared, wait) if wait else None
        seen = live.snapshot(cluster, namespace)
        lines, training = live.explain(seen), live.training_of(cluster, seen, namespace)
        differences = live.differences(cluster, declared) if drift else None
    if json:
        print_json(
            {
                "stack": stack,
                "namespace": namespace,
                "workloads": [line.to_json() for line in lines],
                "training": training.to_json() if training else None,
                "drift": None if differences is None else [difference.to_json() for difference in differences],
                "unsettled": unsettled,
            }
        )
    else:
        _show(lines, training)
        _show_drift(differences, stack=stack)
    if unsettled:
        people.print(f"[bold red]error:[/] {escape(unsettled)}")
    if unsettled or any(line.state == "failing" for line in lines):
        raise typer.Exit(1)


def _declared(stack: str) -> Sequence[Json]:
    """The stack's objects as its file has them."""
    from infra.render import render  # Pulumi's import takes a second

    return render(stack_file(stack), None).manifests


def _waited(cluster: Cluster, declared: Sequence[Json], within_s: float) -> str | None:
    """Why the stack is not settled after all that time; None where it is."""
    try:
        settle(cluster, declared, within_s=within_s, say=sayer())
    except Unsettled as error:
        return str(error)
    return None


def _show(lines: list[live.Line], training: live.Training | None) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("workload", "state", "ready", "what it is doing"):
        table.add_column(name, overflow="fold")
    for line in lines:
        ready = f"{line.ready}/{line.wanted}" if line.wanted else ""
        table.add_row(line.what, Text(line.state, style=COLOURS.get(line.state, "")), ready, Text("\n".join(line.says)))
    people.print(table if lines else "nothing runs, and nothing waits")
    if training:
        people.print(Text.assemble(("training ", "bold"), str(training)))


def _show_drift(differences: list[live.Difference] | None, *, stack: str) -> None:
    if differences is None:
        return
    if not differences:
        people.print("as declared", style="dim")
        return
    people.print(Text(f"\ndiffers from the stack file in {len(differences)}:", style="bold"))
    for difference in differences:
        people.print(Text.assemble("  ", (difference.what, "yellow"), f" {difference.says}"))
    people.print(f"To make it so: {me()} apply -s {stack}, or pulumi up -s {stack}", style="dim", markup=False)
