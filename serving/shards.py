"""Shards of a batch: which lines are whose, and where their answers lie, over any fsspec URL.

The input is one sequence of bytes: its files, by name, one after another. Shard k of n has the lines that begin in the
k-th n-th of it, so that nobody has to count lines. Of every shard a window of consecutive lines is a file of answers,
named by where its first line begins, which appears whole or not at all: a line is never answered twice, however often
its window was begun. A shard's windows are joined in order, and so are the shards.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from serving.errors import Refused

COPY_BYTES = 1 << 20
OFFSET_DIGITS = 16


@dataclass(frozen=True)
class Line:
    offset: int  # where it begins in the whole input
    raw: bytes


class Input:
    """The lines of a file, of a directory's `*.jsonl`, or of what a pattern matches."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, path = _open_url(url)
        if "*" in path:
            paths = self._fs.glob(path)
        elif self._fs.isdir(path):
            paths = self._fs.glob(f"{path.rstrip('/')}/*.jsonl")
        else:
            paths = [path] if self._fs.exists(path) else []
        if not paths:
            raise Refused("there is no such input", where=url, fix="Give a file, a directory of *.jsonl or a pattern")
        self.files = [(str(path), int(self._fs.size(path))) for path in sorted(map(str, paths))]
        self.bytes = sum(size for _, size in self.files)

    def lines(self, shard: int, shards: int) -> Iterator[Line]:
        """The lines of one shard that hold anything, in order."""
        first, end = self.bytes * shard // shards, self.bytes * (shard + 1) // shards
        base = 0
        for path, size in self.files:
            if base < end and base + size > first:
                for line in self._lines_of(path, start=max(first - base, 0), end=end - base):
                    if line.raw.strip():
                        yield Line(base + line.offset, line.raw)
            base += size

    def _lines_of(self, path: str, *, start: int, end: int) -> Iterator[Line]:
        """The lines of a file that begin at `start` or after it, and before `end`."""
        with self._fs.open(path, "rb") as file:
            # A line that begins before `start` is another shard's, to its end.
            if start:
                file.seek(start - 1)
                file.readline()
            while (offset := file.tell()) < end and (raw := file.readline()):
                yield Line(offset, raw)


class Output:
    """A directory: `answers.jsonl` and `summary.json` once all is done, and until then the work of each shard."""

    def __init__(self, url: str, *, work: str) -> None:
        self.url = url
        self._fs, self._root = _open_url(url)
        self._root = self._root.rstrip("/")
        self._work = f"{self._root}/work-{work}"

    def windows(self, shard: int) -> dict[int, str]:
        """Where the windows begin that are answered → their files."""
        folder = self._folder(shard)
        self._fs.invalidate_cache()
        paths = self._fs.glob(f"{folder}/*.jsonl") if self._fs.exists(folder) else []
        return {int(Path(str(path)).stem): str(path) for path in sorted(map(str, paths))}

    def put_window(self, shard: int, offset: int, answers: Iterable[dict[str, Any]]) -> None:
        text = b"".join(json.dumps(answer).encode() + b"\n" for answer in answers)
        self._put(f"{self._folder(shard)}/{offset:0{OFFSET_DIGITS}}.jsonl", text)

    def pin(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """What was first said under `name`, by whichever shard: `value` where nothing was."""
        path = f"{self._work}/{name}.json"
        if not self._fs.exists(path):
            self._put(path, json.dumps(value).encode())
        return self._read(path)

    def finish_shard(self, shard: int) -> None:
        """Joins the shard's windows, and says so last."""
        windows = self.windows(shard)
        with _joined(self._fs, windows.values()) as made:
            counts = _count(made)
            self._put_file(f"{self._work}/shard-{shard:05}.jsonl", made)
        self._put(f"{self._work}/shard-{shard:05}.json", json.dumps(counts).encode())

    def is_finished(self, shard: int) -> bool:
        return self._fs.exists(f"{self._work}/shard-{shard:05}.json")

    def summary(self) -> dict[str, Any] | None:
        """What the directory's answers are, once they are all there."""
        path = f"{self._root}/summary.json"
        return self._read(path) if self._fs.exists(path) else None

    def finish(self, shards: int, *, about: dict[str, Any]) -> bool:
        """Joins the shards in order when all are finished, and says whether they are. Several shards may do so at once: it is the
        same."""
        self._fs.invalidate_cache()
        if not all(self.is_finished(shard) for shard in range(shards)):
            return False
        names = [f"{self._work}/shard-{shard:05}" for shard in range(shards)]
        counts = [self._read(f"{name}.json") for name in names]
        with _joined(self._fs, [f"{name}.jsonl" for name in names]) as made:
            self._put_file(f"{self._root}/answers.jsonl", made)
        total = {key: sum(count[key] for count in counts) for key in ("lines", "failed")}
        self._put(f"{self._root}/summary.json", json.dumps(about | total).encode())
        return True

    def clear(self) -> None:
        """Removes the shards' work, which the answers have made superfluous."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._work, recursive=True)

    def _folder(self, shard: int) -> str:
        return f"{self._work}/shard-{shard:05}"

    def _read(self, path: str) -> dict[str, Any]:
        return json.loads(self._fs.cat_file(path))

    def _put(self, path: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "made"
            made.write_bytes(content)
            self._put_file(path, made)

    def _put_file(self, path: str, made: Path) -> None:
        """The file appears whole: an object store shows nothing before all of it is there, and a disk renames."""
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.put_file(str(made), path)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".part")
        try:
            with open(handle, "wb") as copy, open(made, "rb") as source:
                shutil.copyfileobj(source, copy, COPY_BYTES)
                copy.flush()
                os.fsync(copy.fileno())
            os.replace(beside, target)
        except BaseException:
            os.unlink(beside)
            raise


def fingerprint(source: Input, *, endpoint: str, model: str, shards: int, window: int) -> str:
    """What the work of shards goes by: the same question of the same input goes on, another begins anew."""
    asked = json.dumps([source.files, endpoint, model, shards, window])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _joined(fs: Any, paths: Iterable[str]) -> Iterator[Path]:
    """One file of this machine's, for as long as the context lasts, with the contents of `paths` in order."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "joined"
        with open(made, "wb") as joined:
            for path in paths:
                with fs.open(path, "rb") as source:
                    shutil.copyfileobj(source, joined, COPY_BYTES)
        yield made


def _count(path: Path) -> dict[str, int]:
    lines = failed = 0
    with open(path, "rb") as file:
        for raw in file:
            response = json.loads(raw)["response"]
            lines += 1
            failed += response is None or response["status_code"] >= 400
    return {"lines": lines, "failed": failed}


def _open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL, untyped as fsspec's own answers are, and the path in it.

    Raises `Refused` for a scheme that nothing here opens.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)  # pyright: ignore[reportAttributeAccessIssue]
    except (ValueError, ImportError) as error:
        raise Refused(str(error), where=url, fix="Give a path, or a URL that fsspec opens") from None
    return fs, str(path)
