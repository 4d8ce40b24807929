"""`slipway plan`: what a stack will run, whether it fits, how long and how much, before anything exists."""

from pathlib import Path
from typing import Annotated, Any

import typer

from infra.checks import Finding, check
from infra.cli.against import Change, changes, plan_of
from infra.cli.edit import difference
from infra.cli.fix import Fixed, fix
from infra.cli.project import AsJson, Refusal, StackName, people, print_json, stack_file
from infra.cli.project import planned as plan_file
from infra.cli.report import page
from infra.cli.show import show_changes, show_diff, show_findings, show_plan
from infra.planner import Plan, to_json
from infra.spec import line_finder


def plan(
    stack: StackName = "local",
    json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained page, to attach to a pull request.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="REV|DIR", help="Show what differs from a Git revision or another folder."),
    ] = None,
    mend: Annotated[
        bool, typer.Option("--fix", help="Apply the patches of error findings to the stack file, and plan again.")
    ] = False,
) -> None:
    """Say what a stack will run, whether it fits, how long and how much, before anything exists.

    Exits 2 when a check refuses the stack.
    """
    file = stack_file(stack)
    fixed = fix(file) if mend else None
    planned = plan_file(file)
    findings = check(planned.stack, planned)
    differs = None if against is None else changes(plan_of(against, stack=stack), planned)
    if html:
        _write(html, page(planned, findings, stack=stack, changes=differs, against=against))
    if json:
        print_json(_document(planned, findings, stack=stack, file=file, fixed=fixed, differs=differs))
    else:
        _show(planned, findings, stack=stack, file=file, fixed=fixed)
        if differs is not None:
            show_changes(differs, against=str(against), console=people)
        if html:
            people.print(f"report: {html}", style="dim", markup=False)
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(2)


def _show(planned: Plan, findings: tuple[Finding, ...], *, stack: str, file: Path, fixed: Fixed | None) -> None:
    if fixed:
        show_diff(difference(fixed.before, fixed.after, file=file), applied=fixed.applied, console=people)
    show_plan(planned, stack=stack, console=people)
    show_findings(findings, console=people, file=file)


def _document(
    planned: Plan,
    findings: tuple[Finding, ...],
    *,
    stack: str,
    file: Path,
    fixed: Fixed | None,
    differs: list[Change] | None,
) -> dict[str, Any]:
    line_of = line_finder(file)
    document: dict[str, Any] = {
        "stack": stack,
        "plan": to_json(planned),
        "findings": [finding.to_json() | {"line": line_of(finding.where)} for finding in findings],
    }
    if fixed:
        document["fixed"] = [finding.to_json() for finding in fixed.applied]
    if differs is not None:
        document["changes"] = [change.to_json() for change in differs]
    return document


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    if not file.name:
        raise Refusal(f"no name of a file ({file}). Fix: --html plan.html")
    beside = file.with_name(f".{file.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Refusal(f"{error.strerror} ({file}). Fix: give --html a file in a folder that can be written") from None
