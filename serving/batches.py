"""Batches: many requests from a file, answered to a file. Each line is answered exactly once, however often we are killed.

An answer is appended to the batch's journal in one write before it counts as made. Who starts again reads the journal,
drops a last line that was cut, and goes on with the lines that have no answer. When none is left the answers are
written out in the order of the input, beside their place first. Of the servers that share a directory one works.
"""

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from serving import logs
from serving.files import FileStore, new_id, read_json, write_json

CONCURRENCY = 32
LOOK_AGAIN_S = 0.5
RETRY_S = 0.5  # doubles with each try, up to …
RETRY_MAX_S = 30.0
BUG_TRIES = 3  # a 500 that comes this often is the line's fault
MOST_LINES = 50_000  # in one batch: OpenAI's
LINE_LIMIT_BYTES = 4 << 20  # a million tokens as text; reading more JSON at once would hold up who is being answered
FINAL = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Batch:
    id: str
    owner: str
    endpoint: str
    input_file_id: str
    created_at: int
    status: str = "validating"
    completion_window: str = "24h"
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    finished_at: int | None = None
    metadata: dict[str, str] | None = None
    key: str = ""  # whose quota the answers are charged to
    problem: str | None = None  # why it failed

    def body(self) -> dict[str, Any]:
        hidden = ("owner", "key", "total", "completed", "failed", "finished_at", "problem")
        described = {key: value for key, value in asdict(self).items() if key not in hidden}
        counts = {"total": self.total, "completed": self.completed, "failed": self.failed}
        ended = {f"{self.status}_at": self.finished_at} if self.status in FINAL else {}
        error = {"code": "invalid_input", "message": self.problem, "param": "input_file_id", "line": None}
        errors = None if self.problem is None else {"object": "list", "data": [error]}
        return {**described, **ended, "object": "batch", "errors": errors, "request_counts": counts}


Answered = tuple[int, str, dict[str, Any]]  # status, request id, body
Answer = Callable[[Batch, str, Any], Awaitable[Answered]]


class BatchStore:
    """The state of every batch, beside the files."""

    def __init__(self, files: FileStore) -> None:
        self.files = files

    def create(
        self, *, owner: str, key: str, endpoint: str, input_file_id: str, metadata: dict[str, str] | None
    ) -> Batch:
        batch = Batch(f"batch-{new_id()}", owner, endpoint, input_file_id, int(time.time()), metadata=metadata, key=key)
        self.save(batch)
        return batch

    def save(self, batch: Batch) -> None:
        write_json(self._path(batch.id), asdict(batch))

    def get(self, batch_id: str) -> Batch | None:
        value = read_json(self._path(batch_id))
        return self._seen(Batch(**value)) if value is not None else None

    def all(self) -> list[Batch]:
        """Every batch, newest first."""
        found = [self.get(path.stem) for path in self.files.root.glob("batch-*.json")]
        return sorted((b for b in found if b is not None), key=lambda b: (-b.created_at, b.id))

    def cancel(self, batch: Batch) -> Batch:
        """Asks whoever works on it to stop: a mark of its own, since the state belongs to the one who works."""
        self._mark(batch.id).touch()
        return self._seen(batch)

    def cancelled(self, batch_id: str) -> bool:
        return self._mark(batch_id).exists()

    def journal(self, batch_id: str) -> Path:
        return self.files.root / f"{batch_id}.journal"

    def finish(self, batch: Batch) -> None:
        self.save(replace(batch, finished_at=int(time.time())))
        self.journal(batch.id).unlink(missing_ok=True)
        self._mark(batch.id).unlink(missing_ok=True)

    def _seen(self, batch: Batch) -> Batch:
        waits = batch.status not in FINAL and self.cancelled(batch.id)
        return replace(batch, status="cancelling") if waits else batch

    def _path(self, batch_id: str) -> Path:
        return self.files.root / f"{batch_id}.json"

    def _mark(self, batch_id: str) -> Path:
        return self.files.root / f"{batch_id}.cancel"


class Journal:
    """The answers made so far, in the order in which they were made."""

    def __init__(self, path: Path) -> None:
        self.places: dict[int, tuple[bool, int]] = {}  # line of the input → (succeeded, offset of its answer)
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by `close`)
        self._file.seek(0)
        whole = 0
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            entry = json.loads(raw)
            self.places[entry["line"]] = (entry["ok"], whole)
            whole += len(raw)
        self._file.truncate(whole)

    def append(self, line: int, *, ok: bool, answer: dict[str, Any]) -> None:
        raw = json.dumps({"line": line, "ok": ok, "answer": answer}).encode() + b"\n"
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(raw)
        self._file.flush()
        self.places[line] = (ok, offset)

    def answers(self, *, ok: bool) -> Iterator[bytes]:
        """The answers that succeeded, or those that did not, in the order of the input."""
        for line in sorted(self.places):
            succeeded, offset = self.places[line]
            if succeeded == ok:
                self._file.seek(offset)
                yield json.dumps(json.loads(self._file.readline())["answer"]).encode() + b"\n"

    def count(self, *, ok: bool) -> int:
        return sum(succeeded == ok for succeeded, _ in self.places.values())

    def close(self) -> None:
        self._file.close()


class BatchRunner:
    """Works on the batches of a store, the oldest first, for as long as `run` runs."""

    def __init__(self, store: BatchStore, answer: Answer) -> None:
        self.store, self._answer = store, answer

    async def run(self) -> None:
        with open(self.store.files.root / ".lock", "w") as lock:
            while not _locked(lock):  # another server works here; when it ends, its lock does
                await asyncio.sleep(LOOK_AGAIN_S)
            while True:
                try:
                    open_batches = [b for b in await asyncio.to_thread(self.store.all) if b.status not in FINAL]
                    for batch in reversed(open_batches):
                        await self._work_on(batch)
                except OSError as error:  # a full disk, a share that is away: the answers made so far are kept
                    logs.event("error", level="error", message=f"batches wait: {error}")
                    await asyncio.sleep(RETRY_MAX_S)
                await asyncio.sleep(LOOK_AGAIN_S)

    async def _work_on(self, batch: Batch) -> None:
        lines = await asyncio.to_thread(_read_lines, self.store.files.data(batch.input_file_id))
        problem = "The input file has no lines, or has been deleted" if not lines else None
        if len(lines) > MOST_LINES:
            problem = f"The input file has more than {MOST_LINES} lines; split it, or use `slipway batch`"
        if problem is not None:
            self.store.finish(replace(batch, status="failed", problem=problem))
            return
        journal = Journal(self.store.journal(batch.id))
        try:
            began = batch.in_progress_at or int(time.time())
            batch = replace(batch, status="in_progress", total=len(lines), in_progress_at=began)
            await self._answer_all(batch, lines, journal)
            batch = replace(batch, status="finalizing", finalizing_at=int(time.time()))
            self.store.save(_counted(batch, journal))
            await asyncio.to_thread(self._write_out, batch, journal)
        finally:
            journal.close()

    async def _answer_all(self, batch: Batch, lines: list[bytes], journal: Journal) -> None:
        """Answers what is not in the journal yet, many lines at a time. Returns early when the batch is cancelled."""
        waiting = (found for found in _requests(lines, batch.endpoint) if found[0] not in journal.places)
        running: set[asyncio.Task[None]] = set()
        next_save_s = 0.0
        try:
            while not self.store.cancelled(batch.id):
                more = itertools.islice(waiting, CONCURRENCY - len(running))
                for n, request in await asyncio.to_thread(list, more):
                    running.add(asyncio.create_task(self._answer_line(batch, n, request, journal)))
                if not running:
                    return
                done, running = await asyncio.wait(running, timeout=LOOK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                if time.monotonic() >= next_save_s:
                    next_save_s = time.monotonic() + LOOK_AGAIN_S
                    self.store.save(_counted(batch, journal))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _answer_line(self, batch: Batch, n: int, request: "Request", journal: Journal) -> None:
        if request.problem is not None:
            journal.append(n, ok=False, answer=line_answer(_line_id(batch, n), request, None))
            return
        answered = await persist(lambda: self._answer(batch, batch.endpoint, request.body))
        journal.append(n, ok=answered[0] < 400, answer=line_answer(_line_id(batch, n), request, answered))

    def _write_out(self, batch: Batch, journal: Journal) -> None:
        found: dict[str, str | None] = {}
        for kind, ok in (("output", True), ("errors", False)):
            found[kind] = None
            if journal.count(ok=ok):
                file_id = f"{batch.id.replace('batch-', 'file-')}-{kind}"
                with tempfile.TemporaryFile() as joined:
                    joined.writelines(journal.answers(ok=ok))
                    joined.seek(0)
                    name = f"{batch.id}-{kind}.jsonl"
                    source: BinaryIO = joined  # pyright: ignore[reportAssignmentType]
                    self.store.files.add(
                        source, owner=batch.owner, filename=name, purpose="batch_output", file_id=file_id
                    )
                found[kind] = file_id
        status = "completed" if len(journal.places) == batch.total else "cancelled"
        batch = replace(
            _counted(batch, journal), status=status, output_file_id=found["output"], error_file_id=found["errors"]
        )
        self.store.finish(batch)
        logs.event("batch", id=batch.id, status=status, total=batch.total, failed=batch.failed)


@dataclass(frozen=True)
class Request:
    """One line of the input: what to ask, or why it cannot be asked."""

    custom_id: str | None
    body: Any = None
    problem: str | None = None


def line_answer(line_id: str, request: Request, answered: Answered | None) -> dict[str, Any]:
    """A line of the output, in OpenAI's form; `answered` is None for a line that could not be asked."""
    error = None if request.problem is None else {"code": "invalid_request", "message": request.problem}
    response = None if answered is None else dict(zip(("status_code", "request_id", "body"), answered, strict=True))
    return {"id": line_id, "custom_id": request.custom_id, "response": response, "error": error}


async def persist(ask: Callable[[], Awaitable[Answered]]) -> Answered:
    """The answer to one line. A server that is busy, loading or ending is asked again, for as long as it takes."""
    delay_s, bugs = RETRY_S, 0
    while True:
        answered = await ask()
        bugs += answered[0] == 500
        if answered[0] not in (429, 500, 503) or bugs == BUG_TRIES:
            return answered
        await asyncio.sleep(delay_s)
        delay_s = min(2 * delay_s, RETRY_MAX_S)


def request_of(raw: bytes, endpoint: str, seen: set[str]) -> Request:
    """What a line of the input asks; `seen` are the ids of the lines before it."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return Request(None, problem="The line is no JSON")
    if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
        return Request(None, problem="The line has no 'custom_id'")
    custom_id = line["custom_id"]
    if custom_id in seen:
        return Request(custom_id, problem="Another line before this one has the same 'custom_id'")
    seen.add(custom_id)
    if line.get("method") != "POST" or line.get("url") != endpoint:
        return Request(custom_id, problem=f"'method' must be POST and 'url' {endpoint}, the batch's endpoint")
    if not isinstance(line.get("body"), dict):
        return Request(custom_id, problem="'body' must be an object")
    return Request(custom_id, body=line["body"])


def _requests(lines: list[bytes], endpoint: str) -> "Iterator[tuple[int, Request]]":
    """(line's number, what it asks) of each line, read when it is wanted."""
    seen: set[str] = set()
    for n, raw in enumerate(lines):
        if len(raw) > LINE_LIMIT_BYTES:
            yield n, Request(None, problem=f"The line is longer than {LINE_LIMIT_BYTES} bytes")
        else:
            yield n, request_of(raw, endpoint, seen)


def _read_lines(path: Path) -> list[bytes]:
    """The lines of a file that hold anything."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return [raw for raw in file if raw.strip()]
    return []


def _counted(batch: Batch, journal: Journal) -> Batch:
    return replace(batch, completed=journal.count(ok=True), failed=journal.count(ok=False))


def _line_id(batch: Batch, n: int) -> str:
    return f"{batch.id.replace('batch-', 'batch_req_')}-{n}"


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
