"""Log events: one JSON object a line when stdout is read by a program, plain lines when it is read by a person."""

import json
import logging
import sys
import time
import traceback
from datetime import UTC, datetime

PROGRESS_INTERVAL_S = 0.25  # the contract: at most four `progress` events a second


def event(name: str, *, level: str = "info", **fields: object) -> None:
    """Writes the log event `name`; `fields` are plain JSON values. Safe from any thread (one write a line)."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    if sys.stdout.isatty():
        words = " ".join(f"{key}={value}" for key, value in fields.items())
        line = f"{now[11:19]} {name} {words}".rstrip()
    else:
        line = json.dumps({"ts": now, "level": level, "event": name, **fields}, default=str)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def end(error: Exception, *, code: int) -> int:
    """Says in the log and on stderr why a program ends; returns its exit code."""
    event("error", level="error", message=str(error))
    print(f"error: {error}", file=sys.stderr)
    return code


class Progress:
    """`progress` events of one stage, at most four a second, with the last one always written."""

    def __init__(self, stage: str, *, unit: str) -> None:
        self.stage, self.unit = stage, unit
        self._next_s = 0.0

    def update(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s or done >= total:
            self._next_s = now_s + PROGRESS_INTERVAL_S
            event("progress", stage=self.stage, done=done, total=total, unit=self.unit)


class EventHandler(logging.Handler):
    """Sends the standard library's log records (uvicorn's, asyncio's) down the same road as our own events."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, object] = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[0] is not None:
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        event("error" if record.levelno >= logging.ERROR else "log", level=record.levelname.lower(), **fields)


def capture_standard_logging() -> None:
    logging.basicConfig(level=logging.WARNING, handlers=[EventHandler()], force=True)
