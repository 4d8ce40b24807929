"""`slipway estimate`: published measurements against the planner, point by point, and how far it errs."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from infra.cli.project import AsJson, Refusal, people, print_json
from infra.planner.accuracy import Accuracy, kind_of, measure

GOALS = {
    "training memory": (0.06, 0.15),
    "training throughput": (0.15, 0.35),
    "inference memory": (0.02, 0.10),
    "decode throughput": (0.12, None),
    "all-reduce": (0.20, None),
    "oom and fits": (0.0, 0.0),
}
"""Median and 90th percentile of |error| that the planner is held to on points that it has not seen."""


def estimate(
    file: Annotated[Path, typer.Argument(help="JSON file: a list of published measurements.")],
    json: AsJson = False,
) -> None:
    """Predict published measurements and show how far the planner errs.

    Each quantity under `measured` is predicted from the other fields of its point. A point that cannot be estimated is listed
    with the reason; what a point does not say and the planner had to assume is in `assumptions` of --json.
    """
    found = measure(read_points(file))
    if json:
        print_json(found.to_json())
    else:
        show(found)


def read_points(file: Path) -> list[dict[str, Any]]:
    """The points in `file`. Raises `Refusal` for what is no list of points."""
    try:
        document = jsonlib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"no such file ({file}). Fix: name a JSON file of points") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Refusal(f"not JSON in UTF-8: {error} ({file}). Fix: give a list of points") from None
    if isinstance(document, dict) and "points" in document:
        document = cast("dict[str, Any]", document)["points"]
    if not isinstance(document, list):
        raise Refusal(f'no list of points ({file}). Fix: give `[{{"id": …, "measured": {{…}}}}, …]`')
    return cast("list[dict[str, Any]]", document)


def show(found: Accuracy) -> None:
    """Points, then kinds of quantity with their goals, then what could not be estimated."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("point", "kind", "quantity"):
        table.add_column(name)
    for name in ("measured", "predicted", "error"):
        table.add_column(name, justify="right")
    for row in found.points:
        right = row.rel_error == 0 if isinstance(row.measured, bool) else abs(row.rel_error) <= 0.15
        error = ("right" if right else "wrong") if isinstance(row.measured, bool) else f"{row.rel_error:+.1%}"
        table.add_row(
            row.id,
            kind_of(row),
            row.quantity,
            _value(row.measured),
            _value(row.predicted),
            error,
            style="" if right else "yellow",
        )
    people.print(table)
    kinds = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("kind", "count", "median |error|", "goal", "90th percentile", "goal"):
        kinds.add_column(name, justify="left" if name == "kind" else "right")
    for kind, values in found.categories.items():
        goals = ["–" if goal is None else f"{goal:.0%}" for goal in GOALS[kind]]
        kinds.add_row(
            kind, f"{values['count']:.0f}", f"{values['median']:.1%}", goals[0], f"{values['p90']:.1%}", goals[1]
        )
    people.print(kinds)
    people.print(f"not estimated: {len(found.not_estimated)}")
    for missed in found.not_estimated:
        people.print(f"  {missed.id}: {missed.why}", markup=False)


def _value(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
