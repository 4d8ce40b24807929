"""Files that clients upload and batches write: a directory, in which a file is whole or not there.

`<id>.data` is renamed into place first and `<id>.json`, which makes it known, last. Replicas may share the directory.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

FILE_ID = re.compile(r"file-[a-z0-9]{24}(-output|-errors)?")
COPY_BYTES = 1 << 20


def new_id() -> str:
    return secrets.token_hex(12)


@dataclass(frozen=True)
class File:
    id: str
    owner: str  # whose tenant sees it
    filename: str
    purpose: str
    bytes: int
    created_at: int

    def body(self) -> dict[str, Any]:
        described = {key: value for key, value in asdict(self).items() if key != "owner"}
        return {**described, "object": "file", "status": "processed"}


class FileStore:
    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def add(self, source: BinaryIO, *, owner: str, filename: str, purpose: str, file_id: str | None = None) -> File:
        """Copies `source` in. With an id of its own, a file that is there already is replaced by its like."""
        file_id = file_id or f"file-{new_id()}"
        beside = self.root / f".{file_id}-{new_id()}"
        try:
            with open(beside, "wb") as copy:
                while chunk := source.read(COPY_BYTES):
                    copy.write(chunk)
                copy.flush()
                os.fsync(copy.fileno())
                size = copy.tell()
            os.replace(beside, self.data(file_id))
        finally:
            beside.unlink(missing_ok=True)
        file = File(file_id, owner, filename, purpose, size, int(time.time()))
        write_json(self.root / f"{file_id}.json", asdict(file))
        return file

    def get(self, file_id: str, *, owner: str) -> File | None:
        """The file, when it is there and the owner's."""
        if not FILE_ID.fullmatch(file_id):
            return None
        file = _read(self.root / f"{file_id}.json")
        return file if file is not None and file.owner == owner else None

    def all(self, *, owner: str) -> list[File]:
        """The owner's files, newest first."""
        found: Iterator[File | None] = (_read(path) for path in self.root.glob("file-*.json"))
        return sorted((f for f in found if f is not None and f.owner == owner), key=lambda f: (-f.created_at, f.id))

    def data(self, file_id: str) -> Path:
        return self.root / f"{file_id}.data"

    def remove(self, file: File) -> None:
        (self.root / f"{file.id}.json").unlink(missing_ok=True)
        self.data(file.id).unlink(missing_ok=True)


def _read(path: Path) -> File | None:
    value = read_json(path)
    return File(**value) if value is not None else None


def read_json(path: Path) -> dict[str, Any] | None:
    """A file that `write_json` wrote; None when it is not there."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces a small file at once: a reader sees the old one or the new one."""
    beside = path.with_name(f".{path.name}-{new_id()}")
    beside.write_text(json.dumps(value))
    os.replace(beside, path)
