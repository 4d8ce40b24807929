"""What a program says while it runs: JSON lines for machines, a progress bar and sentences for people."""

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PROGRESS_INTERVAL_S = 0.25


class Log:
    """Events of one program. On a terminal they become a bar and sentences; anywhere else one JSON object a line.

    Ranks other than 0 say nothing: every rank would say the same.
    """

    def __init__(self, *, rank: int = 0) -> None:
        self._quiet = rank != 0
        self._terminal = sys.stdout.isatty()
        self._progress_at_s = float("-inf")
        self._bar: Progress | None = None
        self._task: Any = None
        self._stage = ""

    def emit(self, event: str, *, level: str = "info", **fields: Any) -> None:
        if self._quiet:
            return
        if self._terminal:
            if event != "progress":
                self._say(event, level=level, fields=fields)
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        print(json.dumps({"ts": now, "level": level, "event": event, **fields}, ensure_ascii=False), flush=True)

    def progress(self, stage: str, *, done: int, total: int, unit: str, **fields: Any) -> None:
        """At most four a second, except that the last one (done = total) is always told."""
        now_s = time.monotonic()
        if self._quiet or (now_s - self._progress_at_s < PROGRESS_INTERVAL_S and done < total):
            return
        self._progress_at_s = now_s
        if self._terminal:
            self._draw(stage, done=done, total=total, unit=unit, fields=fields)
        else:
            self.emit("progress", stage=stage, done=done, total=total, unit=unit, **fields)

    def _draw(self, stage: str, *, done: int, total: int, unit: str, fields: dict[str, Any]) -> None:
        if self._bar is None or stage != self._stage:
            self.close()
            columns = (
                TextColumn("{task.description:>9}"),
                BarColumn(40),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._task = self._bar.add_task(stage, total=total, unit=unit, note="")
            self._stage = stage
            self._bar.start()
        note = " · ".join(f"{name} {_short(value)}" for name, value in fields.items() if name != "step")
        self._bar.update(self._task, completed=done, total=total, unit=unit, note=note)
        if done >= total:
            self.close()

    def _say(self, event: str, *, level: str, fields: dict[str, Any]) -> None:
        if event == "error":
            self.close()  # the sentence itself goes to stderr
            return
        console = self._bar.console if self._bar else Console()
        style = {"warning": "yellow"}.get(level, "dim")
        text = " · ".join(f"{name} {_short(value)}" for name, value in fields.items())
        console.print(f"{event:>9}  {text}", style=style, markup=False, highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
