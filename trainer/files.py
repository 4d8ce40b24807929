"""Files that appear whole or not at all, and the digests by which they are known."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that digests are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(directory: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """`{relative path: {"sha256", "bytes"}}` of every file under a directory, sorted by path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [(path.relative_to(directory).as_posix(), path) for path in files]
    return {
        name: {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
        for name, path in names
        if name not in leave_out
    }


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None when there is no file or no whole object in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def sync(path: Path) -> None:
    """Forces a file's content, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes beside and renames, so that a reader sees the old file or the new one and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yields a directory beside `target` to fill; it takes the place of `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        put_in_place(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def put_in_place(beside: Path, target: Path) -> None:
    """Renames a finished directory to its name, after its files have reached the disk."""
    for path in [*beside.rglob("*"), beside]:
        sync(path)
    if target.exists():
        shutil.rmtree(target)
    beside.rename(target)
    sync(target.parent)


def fill_directory(target: Path, write: Callable[[Path], None], *, last: str) -> None:
    """Fills `target`, which may be a mount point that cannot be renamed, so that `last` is there only when all is.

    Readers go by the file `last`: it is removed first and moved in last.
    """
    target.mkdir(parents=True, exist_ok=True)
    beside = target / ".partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write(beside)
        (target / last).unlink(missing_ok=True)
        for old in target.iterdir():
            if old != beside and old.is_file():
                old.unlink()
        for path in sorted(beside.iterdir(), key=lambda path: path.name == last):
            sync(path)
            path.replace(target / path.name)
        sync(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
