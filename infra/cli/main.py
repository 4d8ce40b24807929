"""`slipway`: a thin face on spec, planner, checks, render and the local runner.

Exit 0 done, 1 failed, 2 refused by a check or bad input.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from infra.checks import Refused
from infra.cli import cluster, images, local
from infra.cli.apply import apply, destroy
from infra.cli.batch import batch
from infra.cli.chat import chat
from infra.cli.check import check
from infra.cli.estimate import estimate
from infra.cli.logs import logs
from infra.cli.plan import plan
from infra.cli.project import AsJson, Refusal, StackName, people, print_json, stack_file
from infra.cli.reference import reference
from infra.cli.size import size
from infra.cli.status import status
from infra.spec import StackError
from infra.spec import schema as stack_schema

app = typer.Typer(
    help="From GPUs to a served model, as one typed Pulumi program.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start with [bold]slipway plan[/], then [bold]slipway local up[/].",
)
app.add_typer(local.app, name="local")
app.add_typer(cluster.app, name="cluster")
app.add_typer(images.app, name="images")
app.command()(plan)
app.command()(check)
app.command()(estimate)
app.command()(size)
app.command()(apply)
app.command()(destroy)
app.command()(status)
app.command()(logs)
app.command()(chat)
app.command()(batch)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference for people instead.")] = False,
) -> None:
    """Print the JSON schema of stack files, as editors read it, or the reference made from it.

    Both are kept: infra/spec/stack.schema.json and docs/stack-reference.md.
    """
    if markdown:
        typer.echo(reference(stack_schema()), nl=False)
    else:
        print_json(stack_schema())


@app.command()
def render(
    stack: StackName = "local",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the manifests and plan.json.")] = Path(
        "build/manifests"
    ),
    json: AsJson = False,
) -> None:
    """Write the stack's Kubernetes manifests, one a file, and plan.json.

    Runs the very program that `pulumi up` runs, in Pulumi's in-process test runtime: no CLI, cluster or credential.
    The same input gives the same bytes, so the folder can be kept in Git for Argo CD or Flux.
    """
    from infra.render import render as render_stack  # Pulumi's import takes a second, which `plan` need not spend

    rendered = render_stack(stack_file(stack), out)
    if json:
        print_json({"stack": stack, "out": str(out), "manifests": len(rendered.manifests), "outputs": rendered.outputs})
    else:
        people.print(f"{len(rendered.manifests)} manifests and plan.json in {out}")


def main() -> None:
    """The console script: refusals are one sentence, without a traceback."""
    try:
        app()
    except (StackError, Refused, Refusal, ValueError) as error:
        for line in str(error).splitlines():
            people.print(f"[bold red]error:[/] {escape(line)}")
        sys.exit(2)


if __name__ == "__main__":
    main()
