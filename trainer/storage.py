"""Where the checkpoints of a run lie: a directory, or a prefix of an object store that fsspec knows (s3://, gs://, …).

A file system can rename: a checkpoint is written under another name and appears whole. An object store cannot: there the
manifest is put last, and what has none is no checkpoint. The digest of a file is taken while it is written, so that no
store is asked for what it was just given.
"""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader, FsspecWriter

from trainer.errors import Refused
from trainer.files import put_in_place, write_json
from trainer.stores import answering, is_local, open_store

_PREFIX, _MANIFEST = "step-", "manifest.json"
_NAME = re.compile(r"step-(\d+)|\.step-(\d+)\.partial")


class _Digested:
    """A stream that knows the digest of all that was written to it, and why no more could be."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._digest, self._bytes = stream, hashlib.sha256(), 0
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._bytes += memoryview(data).nbytes
        try:
            return self._stream.write(data)
        except OSError as error:
            self.failed = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def described(self) -> dict[str, Any]:
        return {"sha256": self._digest.hexdigest(), "bytes": self._bytes}


class Writer(FsspecWriter):
    """PyTorch's writer of one rank's part; `files` has, when it is done, `{name: {"sha256", "bytes"}}`."""

    def __init__(self, url: str, *, renames: bool) -> None:
        """`renames`: on a file system, whose files are also to be forced to the disk."""
        super().__init__(url, sync_files=renames)
        self.files: dict[str, dict[str, Any]] = {}
        self._open, self._held = self.fs.create_stream, io.BytesIO()
        self.fs.create_stream = self._digested if renames else self._without_renaming
        if not renames:
            self.fs.rename = self._put_held

    @contextmanager
    def _without_renaming(self, path: Any, mode: str) -> Iterator[Any]:
        """What PyTorch writes as `.metadata.tmp` is held until it has its name."""
        if not str(path).endswith(".tmp"):
            with self._digested(path, mode) as stream:
                yield stream
            return
        self._held = io.BytesIO()
        yield self._held

    def _put_held(self, path: Any, new_path: Any) -> None:  # noqa: ARG002 - the names are those of `rename`
        with self._digested(new_path, "wb") as stream:
            stream.write(self._held.getvalue())

    @contextmanager
    def _digested(self, path: Any, mode: str) -> Iterator[Any]:
        with self._open(path, mode) as stream:
            digested = _Digested(stream)
            try:
                yield digested
            except RuntimeError:  # torch's zip writer tells of a position that it did not expect, and not why
                if digested.failed is not None:
                    raise digested.failed from None
                raise
        if "w" in mode:
            self.files[str(path).rsplit("/", 1)[-1].removesuffix(".tmp")] = digested.described()


class Storage:
    """Checkpoints by their steps, under a URL or a path."""

    def __init__(self, url: str) -> None:
        """Raises Refused for a file or a URL that fsspec cannot open, Failed for a store that does not answer."""
        self._fs: Any
        self._fs, root = open_store(url, what="store of checkpoints", key="checkpoints=")
        self._local = is_local(self._fs)
        self._root = root if self._local else url.rstrip("/")
        if self._local and self._fs.isfile(root):
            raise Refused("checkpoints lie in a directory, and this is a file", where=url, fix="Name another place.")
        with answering(url, what="store of checkpoints"):
            self.steps()

    def __str__(self) -> str:
        return self._root

    def url(self, step: int) -> str:
        return f"{self._root}/{_PREFIX}{step:08d}"

    def _beside(self, step: int) -> str:
        """Where it is written."""
        return f"{self._root}/.{_PREFIX}{step:08d}.partial" if self._local else self.url(step)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        found = sorted(step for name, step in self._names() if name.startswith(_PREFIX))
        return [step for step in found if self._fs.exists(f"{self.url(step)}/{_MANIFEST}")]

    def _names(self) -> list[tuple[str, int]]:
        """Of all that is there of checkpoints, whole or not, each with its step."""
        self._fs.invalidate_cache()
        try:
            names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        matches = ((name, _NAME.fullmatch(name)) for name in names)
        return [(name, int(match[1] or match[2])) for name, match in matches if match]

    # Writing

    def begin(self, step: int) -> None:
        """Makes room, where an earlier try may have left something."""
        self.give_up(step)
        self._fs.makedirs(self._beside(step), exist_ok=True)

    def writer(self, step: int) -> Writer:
        return Writer(self._beside(step), renames=self._local)

    def seal(self, step: int, manifest: dict[str, Any]) -> None:
        """What was written is a checkpoint from now on."""
        if self._local:
            write_json(Path(self._beside(step)) / _MANIFEST, manifest)
            put_in_place(Path(self._beside(step)), Path(self.url(step)))
        else:
            self._fs.pipe_file(f"{self.url(step)}/{_MANIFEST}", json.dumps(manifest, indent=2).encode())

    def give_up(self, step: int) -> None:
        """Removes what there is of one that is not whole."""
        with suppress(Exception):  # it may not be there; what stays is no checkpoint
            self._remove(self._beside(step))

    def free_bytes(self) -> int | None:
        """The room there is for what is written next; None where nobody knows it."""
        return shutil.disk_usage(self._root).free if self._local else None

    def keep(self, steps: set[int], *, before: int) -> None:
        """Removes all others that are older than `before`, and what is left of those that were never whole."""
        for name, step in self._names():
            if step < before and (step not in steps or not name.startswith(_PREFIX)):
                self._remove(f"{self._root}/{name}")

    def _remove(self, path: str) -> None:
        """The manifest first: a part is no checkpoint."""
        if self._local:
            (Path(path) / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
        elif files := self._fs.find(path):
            files.sort(key=lambda file: not file.endswith(f"/{_MANIFEST}"))
            self._fs.rm(files[:1])
            if files[1:]:
                self._fs.rm(files[1:])

    # Reading

    def reader(self, step: int) -> FsspecReader:
        return FsspecReader(self.url(step))

    def manifest(self, step: int) -> dict[str, Any] | None:
        """None for one that is damaged."""
        try:
            return json.loads(self._fs.cat_file(f"{self.url(step)}/{_MANIFEST}"))
        except (FileNotFoundError, ValueError):
            return None

    def damaged(self, step: int, files: dict[str, dict[str, Any]]) -> str | None:
        """The first file that is absent or does not have the digest that the manifest gives it."""
        return next((name for name, entry in files.items() if not self._whole(f"{self.url(step)}/{name}", entry)), None)

    def _whole(self, path: str, entry: dict[str, Any]) -> bool:
        try:
            with self._fs.open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
        except FileNotFoundError:
            return False
