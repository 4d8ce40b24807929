"""The model registry: immutable, content-addressed packages and channels that point at them, on any fsspec URL.

`models/<name>/<sha256>/` appears whole or not at all: on a file system it is renamed into place, on an object store its
`manifest.json`, without which no reader takes it for a model, is put last.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from trainer.errors import Failed, Refused
from trainer.files import canonical_json, describe_files, digest_of, put_in_place, write_whole
from trainer.log import Log
from trainer.stores import is_local, open_store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Registry:
    filesystem: AbstractFileSystem
    root: str

    @classmethod
    def open(cls, url: str) -> "Registry":
        """Raises Refused for a URL that fsspec cannot open."""
        filesystem, root = open_store(url, what="registry", key="registry=")
        return cls(filesystem, root.rstrip("/"))

    @property
    def is_local(self) -> bool:
        return is_local(self.filesystem)

    def publish(self, package: Path, *, name: str, log: Log) -> str:
        """Puts a package under its digest and returns the digest; what is there already is left alone."""
        manifest = {"files": describe_files(package, leave_out=("manifest.json",))}
        digest = digest_of(manifest)
        target = f"{self.root}/models/{check_name(name)}/{digest}"
        if self.filesystem.exists(f"{target}/manifest.json"):
            return digest
        total_bytes, done_bytes = sum(entry["bytes"] for entry in manifest["files"].values()), 0
        beside = f"{self.root}/models/{name}/.{digest}.{os.getpid()}" if self.is_local else target
        try:
            for path, entry in manifest["files"].items():
                self.filesystem.makedirs(os.path.dirname(f"{beside}/{path}"), exist_ok=True)
                self.filesystem.put_file(str(package / path), f"{beside}/{path}")
                done_bytes += entry["bytes"]
                log.progress("publish", done=done_bytes, total=total_bytes, unit="bytes")
            self.filesystem.pipe_file(f"{beside}/manifest.json", canonical_json(manifest))
            if self.is_local:
                put_in_place(Path(beside), Path(target))
        finally:
            if self.is_local:
                shutil.rmtree(beside, ignore_errors=True)
        return digest

    def channel(self, name: str, channel: str) -> dict[str, Any] | None:
        """What a channel points at, or None where there is no such channel. Raises Failed for a damaged one."""
        path = self._channel_path(name, channel)
        if not self.filesystem.exists(path):
            return None
        try:
            value = json.loads(self.filesystem.cat_file(path))
            return {"digest": value["digest"], "at": value["at"], "history": list(value["history"])}
        except (ValueError, KeyError, TypeError):
            fix = "Put its last good version back, or remove it to begin the history anew."
            raise Failed("the channel file is damaged", where=path, fix=fix) from None

    def move_channel(self, name: str, channel: str, *, digest: str, report: dict[str, Any]) -> None:
        """Points a channel at a digest, adding to its history. One write: a reader sees the old or the new."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        history = (self.channel(name, channel) or {"history": []})["history"]
        entry = {"digest": digest, "at": now, "report": report}
        content = json.dumps({"digest": digest, "at": now, "history": [*history, entry]}, indent=2, ensure_ascii=False)
        path = self._channel_path(name, channel)
        if self.is_local:
            write_whole(Path(path), content + "\n")
        else:
            self.filesystem.makedirs(os.path.dirname(path), exist_ok=True)
            self.filesystem.pipe_file(path, content.encode())

    def _channel_path(self, name: str, channel: str) -> str:
        return f"{self.root}/models/{check_name(name)}/channels/{check_name(channel)}.json"


def check_name(name: str) -> str:
    """A name that is one path segment in every store. Raises Refused."""
    if not _NAME.fullmatch(name):
        raise Refused(f"'{name}' is no name", where="command line", fix="Use letters, digits, '.', '_' and '-'.")
    return name
