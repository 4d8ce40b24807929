"""API keys: who may ask, as whom, and how much. The server knows only hashes; `python -m serving.auth NAME` makes one.

The file (a Secret in a cluster) is JSON, `{"keys": [{"name", "sha256", …}]}`, and is read again when it changes.
A key is 256 random bits, so one round of sha256 is enough: there is no dictionary to try.
"""

import argparse
import hashlib
import hmac
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving import logs
from serving.errors import Refused

PREFIX = "sk-slipway-"
PRIORITIES = {"batch": -1, "normal": 0, "interactive": 1}
LOOK_AGAIN_S = 1.0
Priority = Literal["batch", "normal", "interactive"]
PerMinute = Annotated[int, Field(gt=0)]


class Key(BaseModel):
    """What one key may do. Quotas are each replica's own; None is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=100)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    tenant: str | None = None  # keys of one tenant take their turns together; its own name when not given
    priority: Priority = "normal"
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None

    @property
    def queue_as(self) -> str:
        return self.tenant or self.name


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: list[Key]


class Keys:
    """The keys of a file, kept current. What cannot be read later leaves the last good keys in force, and is said."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._look()
        self._keys = _read(path)
        self._next_look_s = time.monotonic() + LOOK_AGAIN_S

    def find(self, presented: str) -> Key | None:
        """The key whose secret this is. Takes as long for a wrong one as for the right one."""
        self._refresh()
        digest = hashlib.sha256(presented.encode()).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def named(self, name: str) -> Key | None:
        """A key by its name: who has logged in stays so for as long as the key exists."""
        self._refresh()
        return next((key for key in self._keys if key.name == name), None)

    def _refresh(self) -> None:
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + LOOK_AGAIN_S
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self._path)
            logs.event("keys", count=len(self._keys))
        except Refused as error:
            logs.event("error", level="error", message=f"{error} The keys read before stay in force")

    def _look(self) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _read(path: Path) -> list[Key]:
    try:
        keys = KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise Refused(
            f"the API keys cannot be read: {error.strerror}",
            where=str(path),
            fix="Make its entries with `python -m serving.auth NAME`",
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        fix = "Make entries with `python -m serving.auth NAME`"
        raise Refused(f"the API keys are malformed: {what}", where=str(path), fix=fix) from None
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if len(set(values)) < len(values):
            raise Refused(f"two API keys have one {field}", where=str(path), fix="Remove one of them")
    return keys


def main(argv: list[str]) -> int:
    """Prints a new key on stderr, once, and its entry for the file on stdout."""
    parser = argparse.ArgumentParser(prog="python -m serving.auth", description="Makes an API key.")
    parser.add_argument("name", help="whose key it is")
    parser.add_argument("--tenant")
    parser.add_argument("--priority", choices=tuple(PRIORITIES), default="normal")
    parser.add_argument("--requests-per-minute", type=int)
    parser.add_argument("--tokens-per-minute", type=int)
    asked = vars(parser.parse_args(argv))
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key(sha256=hashlib.sha256(secret.encode()).hexdigest(), **asked)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        print(f"error: {first['msg']} (--{str(first['loc'][0]).replace('_', '-')}). Change it", file=sys.stderr)
        return 2
    print(f"The key, shown this once: {secret}", file=sys.stderr)
    print(json.dumps(key.model_dump(exclude_none=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
