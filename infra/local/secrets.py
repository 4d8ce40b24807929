"""Secrets that the manifests name and do not hold: files of the user's, outside of the checkout and of the stack's state.

`DIRECTORY/<name>/<key>` is one value, readable by its owner alone. Pods see files by a link, so that no copy is made and a
new value is seen as a kubelet would bring it; variables are read when a pod starts.
"""

import os
import re
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from infra.local.objects import ManifestError

# Of a Secret's name and of its keys, as the API server has them.
_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
MOST_BYTES = 2**20
"""Of one Secret in Kubernetes."""


@dataclass(frozen=True)
class Secrets:
    directory: Path
    command: str
    """What a person types to set one: `slipway local secret set -s local`."""

    def keys(self, name: str) -> list[str]:
        """Keys of a Secret; [] where there is none of the name."""
        folder = self.directory / name
        return sorted(path.name for path in folder.iterdir()) if _NAME.fullmatch(name) and folder.is_dir() else []

    def names(self) -> list[str]:
        """Secrets that have a key."""
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted(path.name for path in found if self.keys(path.name))

    def file(self, name: str, key: str, *, user: str) -> Path:
        """Where a value lies, for the workload `user`. Raises ManifestError where it is missing, or others may read it."""
        path = self.directory / name / key
        if key not in self.keys(name):
            raise ManifestError(f"no {key} of Secret {name!r} ({user}). {self._fix(name, key)}")
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ManifestError(f"others may read a value of Secret {name!r} ({path}). Run: chmod 600 {path}")
        return path

    def missing(self, name: str, *, user: str) -> ManifestError:
        """What to raise where nothing of a Secret is there, and the manifests do not say which keys it has."""
        return ManifestError(f"no Secret {name!r} on this machine ({user}). {self._fix(name, 'KEY')}")

    def _fix(self, name: str, key: str) -> str:
        return f"Set it: {self.command} {name} {key} < FILE"

    def set(self, name: str, key: str, value: bytes) -> Path:
        """Write a value, whole or not at all, in the place of an earlier one. Raises ValueError for what Kubernetes refuses too."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a Secret. Use lower-case letters, digits and dashes")
        if not _KEY.fullmatch(key) or key.startswith(".."):
            raise ValueError(f"{key!r} is no key of a Secret. Use letters, digits, dashes and dots")
        if not value or len(value) > MOST_BYTES:
            raise ValueError(f"{len(value):,} bytes are no value of a Secret. Give 1 to {MOST_BYTES:,}")
        folder = self.directory / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for each in (self.directory, folder):
            each.chmod(0o700)
        handle, beside = tempfile.mkstemp(dir=self.directory)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(value)
            return Path(beside).replace(folder / key)
        except OSError:
            Path(beside).unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> bool:
        """Whether there was one."""
        if not self.keys(name):
            return False
        shutil.rmtree(self.directory / name)
        return True
