"""`slipway local`: run a stack's rendered manifests as processes of this machine."""

import os
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

from infra.checks import enforce
from infra.cli.board import Board
from infra.cli.project import AsJson, Refusal, StackName, me, people, print_json, root, stack_file
from infra.cli.project import planned as plan_file
from infra.cli.secret import app as secret_app
from infra.cli.secret import require_api_keys
from infra.cli.show import show_findings, show_plan
from infra.cli.summary import Outcome, curl, outcome_of, show_curve, show_evaluation, stream_completion, wait_for_answer
from infra.local import Secrets, client
from infra.spec import Stack

app = typer.Typer(
    help="Run a stack on this machine: its rendered Jobs and Deployments as processes. No cluster, no container engine.",
    no_args_is_help=True,
)
app.add_typer(secret_app, name="secret")

INTERRUPTED = 130
API_KEY = "SLIPWAY_API_KEY"
"""Variable with an API key, where the service asks for one."""
PROMPT = "def "


def state_dir(stack: str) -> Path:
    """Where a stack of this machine keeps its volumes, logs and processes' state."""
    return root() / ".slipway" / stack


@app.command()
def up(stack: StackName = "local", json: AsJson = False) -> None:
    """Bring the stack up, and return when its endpoint answers.

    Only what the stack file's changes touch is run again. Ctrl-C stops everything; the next `up` goes on where it was.
    """
    file = stack_file(stack)
    planned = plan_file(file)
    spec = planned.stack
    show_plan(planned, stack=stack, console=people)
    show_findings(enforce(spec, planned), console=people, file=file)
    secrets = require_api_keys(spec, stack)
    from infra.render import render  # Pulumi's import takes a second: not before the plan is on the screen

    manifests = state_dir(stack) / "manifests"
    try:
        with people.status("declaring the stack"):
            render(file, manifests, here=True)
        people.print()
        final = _run(manifests, state_dir(stack), secrets)
    except client.LocalError as error:
        _fail(error)
    except KeyboardInterrupt:
        people.print("\nStopped, no process is left. `up` again goes on from the last checkpoint.")
        sys.exit(INTERRUPTED)
    _tell(spec, final, stack=stack, json=json)


@app.command()
def down(
    stack: StackName = "local",
    volumes: Annotated[
        bool, typer.Option("--volumes", help="Remove datasets, checkpoints, registry and logs too.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Stop everything that `up` started, whatever state it is in; what it made is kept for the next `up`."""
    try:
        with people.status("stopping"):
            found = client.down(state_dir(stack), purge=volumes and state_dir(stack).exists())
    except client.LocalError as error:
        _fail(error)
    if json:
        print_json(
            {"stack": stack, "was_running": found.was_running, "killed": found.killed, "volumes_removed": volumes}
        )
    else:
        people.print(f"{stack} is down" + ("" if found.was_running or found.killed else " (it was not up)"))


@app.command()
def status(stack: StackName = "local", json: AsJson = False) -> None:
    """What runs, and what waits for what."""
    found = client.status(state_dir(stack))
    if json:
        print_json(found.model_dump())
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("workload", "state", "ready", "what it is doing"):
        table.add_column(name, overflow="fold")
    for workload in found.workloads:
        restarts = f"restarted {workload.restarts} times" if workload.restarts else ""
        doing = " · ".join(part for part in (workload.url or "", workload.reason, restarts) if part)
        name = f"{workload.kind.lower()}/{workload.name}"
        table.add_row(name, workload.state, f"{workload.ready}/{workload.wanted}", doing)
    people.print(table if found.workloads else f"{stack} has never been up. Fix: {me()} local up -s {stack}")


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="A workload or a pod, as `slipway local status` lists them.")],
    stack: StackName = "local",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    json: AsJson = False,
) -> None:
    """Print the log lines of a workload's containers."""
    try:
        for line in client.logs(state_dir(stack), name, follow=follow):
            if json:
                print_json({"pod": line.pod, "container": line.container, "text": line.text})
            else:
                typer.echo(f"{line.pod} {line.container} {line.text}")
    except client.LocalError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _run(manifests: Path, state: Path, secrets: Secrets) -> client.Status:
    """Bring the manifests up, drawing what happens. Returns the settled status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as by Ctrl-C: back only when nothing is left
    with closing(client.up(manifests, state, secrets=secrets)) as events, Board(people) as board:
        try:
            for event in events:
                if event.type == "log" and event.event:
                    board.see(event.event)
                elif event.type == "settled" and event.status:
                    return event.status
        except KeyboardInterrupt:
            board.say("stopping; a run that trains may write its checkpoint")
            raise
    raise client.LocalError("`up` ended before the stack was settled", exit_code=1)


def _tell(spec: Stack, final: client.Status, *, stack: str, json: bool) -> None:
    outcome = outcome_of(_job_lines(final, state_dir(stack)))
    router = next((workload.url for workload in final.workloads if workload.url), None)
    # Each service has a path of its own; the only one has the root too.
    url = f"{router}/{spec.services[0].name}" if router and len(spec.services) > 1 else router
    if url and spec.services:
        with _must_answer(spec, url):
            wait_for_answer(url)
    if json:
        print_json({"stack": stack, "endpoint": router} | vars(outcome))
        return
    for warning in final.warnings:
        people.print(f"[yellow]note:[/] {escape(warning)}")
    people.print()
    show_curve(outcome, console=people)
    show_evaluation(outcome, console=people)
    if url is None or not spec.services:
        return
    _show_endpoint(spec, outcome, url=url, stack=stack)


@contextmanager
def _must_answer(spec: Stack, url: str) -> Generator[None]:
    try:
        yield
    except ConnectionError as error:
        raise Refusal(
            f"the endpoint does not answer ({url}): {error}. Fix: {me()} local logs {spec.services[0].name}"
        ) from None


def _show_endpoint(spec: Stack, outcome: Outcome, *, url: str, stack: str) -> None:
    model = spec.services[0].model
    sample = spec.training.evaluate.sample if spec.training else None
    prompt = sample.prompt if sample else PROMPT
    key, asks = os.environ.get(API_KEY), spec.services[0].api_keys_secret is not None
    if asks and not key:
        people.print(f"\n[bold green]{model}[/] answers at [bold]{url}[/] who has an API key ({API_KEY}).")
    else:
        people.print(f"\n[bold green]{model}[/] answers at [bold]{url}[/]:\n")
        with _must_answer(spec, url):
            tokens = sample.max_tokens if sample else 64
            stream_completion(url, model=model, prompt=prompt, max_tokens=tokens, key=key, console=people)
    people.print("\nTry next:", style="bold")
    ask = curl(url, model=model, prompt=prompt, key=API_KEY if asks else None)
    for command in (ask, f"{me()} local status -s {stack}", "make down"):
        people.print(f"  {command}", markup=False)
    if "report" in outcome.artifacts:
        people.print(f"report: {outcome.artifacts['report']}", style="dim")


def _job_lines(final: client.Status, state: Path) -> Iterator[str]:
    """Log lines of the stack's Jobs; a Job that was complete before logs were kept has none."""
    for workload in final.workloads:
        if workload.kind == "Job":
            try:
                yield from (line.text for line in client.logs(state, workload.name))
            except client.LocalError:
                continue


def _fail(error: client.LocalError) -> NoReturn:
    people.print(f"[bold red]error:[/] {escape(str(error))}")
    sys.exit(error.exit_code)
