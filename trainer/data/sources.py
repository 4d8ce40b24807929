"""Where rows come from: each source is cut into parts that are read apart, in an order that never changes.

A part is some small files, a range of bytes of one JSONL file, some row groups of a Parquet file, or one Arrow file. How
a source is cut depends on its files alone, so that the dataset is the same however many processes read it.
"""

import json
import posixpath
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from trainer.data.config import DatasetsSource, JsonlSource, ParquetSource, Source, StdlibSource, TextSource
from trainer.data.packed import PACKING_ERRORS, damaged, open_packed
from trainer.errors import Refused
from trainer.stores import answering, open_store

PART_BYTES = 64 << 20
_PLAIN = (".jsonl", ".json", ".ndjson")  # anything else may be compressed, and cannot be entered in the middle
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Not the library's own code: what was installed, what tests it, and what a program wrote (code pages, help texts, the
# build's variables), which would teach a model tables instead of Python.
_STDLIB_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


@dataclass(frozen=True)
class Row:
    """One document: a name that stays its own when others come or go, and its fields."""

    name: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Part:
    files: tuple[str, ...]  # below the source's root
    start: int = 0
    stop: int | None = None  # bytes of JSONL, row groups of Parquet; None: the whole
    size_bytes: int = 0


@dataclass
class Reader:
    """The rows of one source, by parts. `skipped` counts files that are not UTF-8 (of the standard library only).

    Of columns only those in `fields` and `tools` are read; all where there are no `fields`, or not all of them.
    """

    source: Source
    fields: tuple[str, ...] = ()
    skipped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.source, StdlibSource):
            self._filesystem, self._root = fsspec.filesystem("file"), sysconfig.get_path("stdlib")
        else:
            self._filesystem, self._root = _open(self.source.path)
        self._only = None  # a path that is a file: the one document of the directory it is in
        if self._filesystem.isfile(self._root):
            self._root, self._only = posixpath.split(self._root)

    @property
    def where(self) -> str:
        return "the standard library" if isinstance(self.source, StdlibSource) else self.source.path

    @property
    def version(self) -> str:
        """What the config does not say and the rows depend on."""
        return f"python {sys.version.split()[0]}" if isinstance(self.source, StdlibSource) else ""

    def parts(self) -> list[Part]:
        """Raises Refused when the source has no files, or files that are not what it says."""
        with answering(self.where, what="corpus"):
            return self._parts()

    def _parts(self) -> list[Part]:
        source = self.source
        if isinstance(source, StdlibSource):
            return _grouped([(name, (Path(self._root) / name).stat().st_size) for name in _stdlib(Path(self._root))])
        files = self._arrow_files() if isinstance(source, DatasetsSource) else self._matching(source.glob)
        if isinstance(source, TextSource):
            return _grouped(files)
        if isinstance(source, JsonlSource):
            return [part for name, size in files for part in _ranges(name, size)]
        if isinstance(source, ParquetSource):
            return [part for name, _ in files for part in self._row_groups(name)]
        return [Part((name,), size_bytes=size) for name, size in files]

    def rows(self, part: Part) -> Iterator[Row]:
        """Raises Refused for what is not text, JSON or Arrow."""
        with answering(self.where, what="corpus"):
            if isinstance(self.source, StdlibSource | TextSource):
                yield from self._text_rows(part)
            elif isinstance(self.source, JsonlSource):
                yield from self._json_rows(part)
            else:
                yield from self._arrow_rows(part)

    def _text_rows(self, part: Part) -> Iterator[Row]:
        for name in part.files:
            path = posixpath.join(self._root, name)
            raw: bytes = self._filesystem.cat_file(path)  # pyright: ignore[reportAssignmentType] - one path gives bytes
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                if isinstance(self.source, TextSource):
                    fix = f"Convert it (iconv -f latin1 -t utf-8) or leave it out with glob, now '{self.source.glob}'."
                    raise Refused(f"not UTF-8 at byte {error.start}", where=path, fix=fix) from None
                self.skipped += 1
                continue
            if text:
                yield Row(name, {"text": text})

    def _json_rows(self, part: Part) -> Iterator[Row]:
        path = posixpath.join(self._root, part.files[0])
        try:
            with (
                open_packed(self._filesystem, path) if part.stop is None else self._filesystem.open(path, "rb") as file
            ):
                for at, line in _lines(file, part):
                    if line.strip():
                        yield Row(f"{part.files[0]}@{at}", _parse(line, where=f"{path}, byte {at}"))
        except (*PACKING_ERRORS, OSError) as error:
            raise damaged(path, error) from None

    def _arrow_rows(self, part: Part) -> Iterator[Row]:
        pyarrow = import_pyarrow()
        path = posixpath.join(self._root, part.files[0])
        with self._filesystem.open(path, "rb") as file:
            try:
                if isinstance(self.source, ParquetSource):
                    import pyarrow.parquet as parquet

                    opened = parquet.ParquetFile(file)
                    columns = self._read(opened.schema_arrow.names)
                    groups = range(part.start, part.stop or 0)
                    tables = (opened.read_row_group(group, columns=columns) for group in groups)
                else:
                    opened = pyarrow.ipc.open_stream(file)
                    columns = self._read(opened.schema.names)
                    tables = (batch.select(columns) for batch in opened)
                for number, table in enumerate(tables, start=part.start):
                    for row, fields in enumerate(table.to_pylist()):
                        plain = {name: _without_nulls(value) for name, value in fields.items()}
                        yield Row(f"{part.files[0]}@{number}:{row}", plain)
            except Refused:
                raise
            except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: of odd dates
                raise damaged(path, error) from None

    def _read(self, names: Sequence[str]) -> list[str]:
        """The columns to read; where one is missing all, so that they are named."""
        enough = self.fields and set(self.fields) <= set(names)
        return [name for name in names if not enough or name in self.fields or name == "tools"]

    def _row_groups(self, name: str) -> Iterator[Part]:
        pyarrow = import_pyarrow()
        import pyarrow.parquet as parquet

        path = posixpath.join(self._root, name)
        with self._filesystem.open(path, "rb") as file:
            try:
                about = parquet.ParquetFile(file).metadata
            except pyarrow.ArrowException as error:
                raise damaged(path, error) from None
        start = size = 0
        for group in range(about.num_row_groups):
            size += about.row_group(group).total_byte_size
            if size >= PART_BYTES or group == about.num_row_groups - 1:
                yield Part((name,), start, group + 1, size)
                start, size = group + 1, 0

    def _arrow_files(self) -> list[tuple[str, int]]:
        state, several = (posixpath.join(self._root, name) for name in ("state.json", "dataset_dict.json"))
        fix = "Name what datasets' save_to_disk wrote."
        try:
            if self._filesystem.exists(several):
                splits = ", ".join(json.loads(self._filesystem.cat_file(several))["splits"])
                fix = f"Add the split to source.path: {splits}."
                raise Refused("these are several splits, not one", where=self.where, fix=fix)
            if not self._filesystem.exists(state):
                raise Refused("there is no state.json", where=self.where, fix=fix)
            about = json.loads(self._filesystem.cat_file(state))
            names = [entry["filename"] for entry in about["_data_files"]]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise Refused("state.json or dataset_dict.json is damaged", where=self.where, fix=fix) from None
        if about.get("_indices_data_files"):
            fix = "Save it again: load_from_disk(…).flatten_indices().save_to_disk(…)."
            raise Refused("the rows are a choice by indices, which older datasets wrote", where=self.where, fix=fix)
        return [(name, int(self._filesystem.size(posixpath.join(self._root, name)) or 0)) for name in names]

    def _matching(self, pattern: str) -> list[tuple[str, int]]:
        """(name below the root, bytes) of every file that matches, sorted; a root that is a file matches alone."""
        if self._only is not None:
            return [(self._only, int(self._filesystem.size(posixpath.join(self._root, self._only)) or 0))]
        found: dict[str, Any] = self._filesystem.glob(posixpath.join(self._root, pattern), detail=True)  # pyright: ignore[reportAssignmentType]
        files = [(posixpath.relpath(path, self._root), about) for path, about in found.items()]
        sizes = sorted((name, int(about.get("size") or 0)) for name, about in files if about["type"] == "file")
        if not sizes:
            raise Refused(f"no file matches '{pattern}'", where=self.where, fix="Set source.glob to what is there.")
        return sizes


def import_pyarrow() -> Any:
    try:
        import pyarrow.ipc
    except ImportError:
        fix = "Install it: pip install pyarrow."
        raise Refused("Parquet and Arrow files need pyarrow", where="source.kind", fix=fix) from None
    return pyarrow


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    filesystem, root = open_store(url, what="corpus", key="source.path")
    with answering(url, what="corpus"):
        there = filesystem.exists(root)
    if not there:
        raise Refused("the corpus does not exist", where=url, fix="Set source.path to a file or a directory.")
    return filesystem, root


def _grouped(files: list[tuple[str, int]]) -> list[Part]:
    """Files in order, as many to a part as make PART_BYTES."""
    parts, names, size = [], [], 0
    for name, size_bytes in files:
        names.append(name)
        size += size_bytes
        if size >= PART_BYTES:
            parts.append(Part(tuple(names), size_bytes=size))
            names, size = [], 0
    return [*parts, Part(tuple(names), size_bytes=size)] if names else parts


def _ranges(name: str, size: int) -> Iterator[Part]:
    if not name.endswith(_PLAIN):
        yield Part((name,), size_bytes=size)
        return
    for start in range(0, size, PART_BYTES):
        stop = min(start + PART_BYTES, size)
        yield Part((name,), start, stop, stop - start)


def _lines(file: Any, part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines that begin within a part, each with where it begins."""
    at = part.start
    if at:  # the line under way belongs to the part before; one that begins just here does not
        file.seek(at - 1)
        at += len(file.readline()) - 1
    while part.stop is None or at < part.stop:
        line = file.readline()
        if not line:
            return
        yield at, line
        at += len(line)


def _parse(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if _SURROGATE.search(line):
            json.dumps(value, ensure_ascii=False).encode()  # half of a pair is no text
    except (ValueError, RecursionError) as error:  # UnicodeError is one too
        raise Refused(f"the line is not JSON: {error}", where=where, fix="Mend or remove it.") from None
    if not isinstance(value, dict):
        raise Refused("the line is no JSON object", where=where, fix='Write lines like {"text": "…"}.')
    return value


def _without_nulls(value: Any) -> Any:
    """What rows were before Arrow gave each the fields of all: `{"tool_calls": None}` is a message that calls nothing."""
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None or name == "content"}
    return value


def _stdlib(root: Path) -> list[str]:
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (name for name in names if not _STDLIB_LEFT_OUT.intersection(name.parts))
    return sorted(name.as_posix() for name in kept if not name.name.startswith("_sysconfigdata"))
