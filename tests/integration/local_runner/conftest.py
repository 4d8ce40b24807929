"""A stack of its own for each test, and the certainty that nothing of it is left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from infra.local import Event, Status, down, status, up
from infra.local.processes import STATE_MARK, marked

ROOT = Path(__file__).parents[3]
_CALLER = """
import contextlib, pathlib, sys
from infra.local import LocalError, up
try:
    with contextlib.closing(up(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))) as events:
        for event in events:
            print(event.type, flush=True)
except LocalError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
except KeyboardInterrupt:
    sys.exit(130)
"""


class Stack:
    """Manifests and a state directory."""

    def __init__(self, directory: Path) -> None:
        self.manifests = directory / "manifests"
        self.state = directory / "state"

    def write(self, *objects: dict[str, Any]) -> None:
        self.manifests.mkdir(exist_ok=True)
        (self.manifests / "all.yaml").write_text(yaml.safe_dump_all(objects))

    def up(self, *objects: dict[str, Any]) -> list[Event]:
        if objects:
            self.write(*objects)
        with contextlib.closing(up(self.manifests, self.state)) as events:
            return list(events)

    def start_up(self, *objects: dict[str, Any]) -> subprocess.Popen[str]:
        """An `up` in a process of its own, as a command line is."""
        self.write(*objects)
        return subprocess.Popen(
            [sys.executable, "-c", _CALLER, str(self.manifests), str(self.state)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def status(self) -> Status:
        return status(self.state)

    def processes(self) -> list[psutil.Process]:
        return list(marked(STATE_MARK, str(self.state)))

    def pids(self) -> dict[str, list[int]]:
        return {pod.name: pod.pids for workload in self.status().workloads for pod in workload.pods}

    def port(self, pod: str, name: str) -> int:
        return next(p.ports[name] for w in self.status().workloads for p in w.pods if p.name == pod)

    def log(self, pod: str, container: str = "main") -> str:
        path = self.state / "logs" / pod / f"{container}.log"
        return path.read_text() if path.exists() else ""

    def volume(self, claim: str) -> Path:
        return self.state / "volumes" / claim


def eventually(holds: Callable[[], Any], within_s: float = 20) -> Any:
    """What `holds` returns once it is true; fails when it does not become so in good time."""
    until = time.monotonic() + within_s
    while not (value := holds()):
        assert time.monotonic() < until, "this did not come true"
        time.sleep(0.05)
    return value


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., Any]:
    return eventually


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path)
    yield made
    for process in made.processes():
        # A test that stopped a process must not make the clean-up wait for it.
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGCONT)
    down(made.state)
    assert not made.processes()
    assert not any((made.state / "pods").glob("*")), "files of pods are removed"
