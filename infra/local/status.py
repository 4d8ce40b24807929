"""What runs, in words: the form of `status.json`, which the supervisor writes and anyone may read."""

import os
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class PodStatus(_Value):
    name: str
    state: str  # Waiting, Running, Ready, Stopping, Complete, Failed
    reason: str = ""
    restarts: int = 0
    exit_code: int | None = None
    pids: list[int] = []
    ports: dict[str, int] = {}


class WorkloadStatus(_Value):
    kind: str
    name: str
    state: str  # Waiting, Running, Ready, Complete, Failed
    reason: str = ""
    ready: int = 0  # pods ready (Deployment), or complete (Job)
    wanted: int = 1
    restarts: int = 0
    exit_code: int | None = None
    url: str | None = None  # where a LoadBalancer publishes it
    pods: list[PodStatus] = []


class Status(_Value):
    running: bool  # whether a supervisor is there
    pid: int | None = None
    workloads: list[WorkloadStatus] = []
    warnings: list[str] = []

    @property
    def settled(self) -> bool:
        """Every Job complete and every Deployment ready."""
        return all(w.state in ("Complete", "Ready") for w in self.workloads)


def write_atomically(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old text or the new, whole."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(beside).replace(path)


def read_status(path: Path) -> Status:
    """The last written status; an empty one where the file is absent or cannot be read."""
    try:
        return Status.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError):
        return Status(running=False)
