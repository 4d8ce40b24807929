"""What is happening, as it happens: one progress bar a stage, from the programs' own log events (docs/contracts.md)."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

STAGES = {
    "data": "prepare data",
    "train": "train",
    "evaluate": "evaluate",
    "publish": "publish",
    "load": "load model",
    "batch": "answer",
}
PLAIN_EVERY_S = 10.0


class _Done(ProgressColumn):
    """`320/600 steps`."""

    def render(self, task: Task) -> Text:
        total = "?" if task.total is None else f"{task.total:,.0f}"
        return Text(f"{task.completed:,.0f}/{total} {task.fields['unit']}", style="dim")


class Board:
    """A context in which `see(event)` draws. On a terminal it moves; elsewhere it is a line a stage every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            _Done(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()

    def see(self, event: Mapping[str, Any]) -> None:
        """Draw one log event; those that are not for people are passed over."""
        stage = str(event.get("stage", ""))
        match event.get("event"):
            case "progress" if stage in STAGES:
                self._advance(stage, event)
            case "resumed":
                self.say(f"{STAGES.get(stage, stage)}: goes on from step {event['step']}")
            case "done" if stage in STAGES:
                self._finish(stage, skipped=bool(event.get("skipped")))
            case "gate":
                self.say(f"gate: {'passed' if event['passed'] else 'refused'}: {event['why']}")
            case "published":
                self.say(f"published {event['name']} {str(event['digest'])[:12]} to channel {event['channel']}")
            case _:
                pass

    def say(self, line: str) -> None:
        """A line of text above the bars."""
        self._progress.console.print(Text(line))

    def _advance(self, stage: str, event: Mapping[str, Any]) -> None:
        note = f"loss {event['loss']:.3f}" if event.get("loss") is not None else ""
        total, unit = event.get("total"), str(event.get("unit", ""))
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(STAGES[stage], total=total, unit=unit, note=note)
        self._progress.update(self._tasks[stage], completed=event["done"], total=total, unit=unit, note=note)
        if not self._console.is_terminal and time.monotonic() - self._said.get(stage, 0) >= PLAIN_EVERY_S:
            self._said[stage] = time.monotonic()
            self.say(f"{STAGES[stage]}: {event['done']}/{total} {unit} {note}".rstrip())

    def _finish(self, stage: str, *, skipped: bool) -> None:
        if stage in self._tasks:
            task = self._progress.tasks[self._tasks[stage]]
            self._progress.update(task.id, completed=task.total or task.completed)
        if skipped or not self._console.is_terminal:
            self.say(f"{STAGES[stage]}: {'nothing to do' if skipped else 'done'}")
