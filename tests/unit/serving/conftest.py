"""Fixtures of the serving tests: tiny packages, and the real server as a real process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from tiny_packages import make_package

ROOT = Path(__file__).parents[3]
START_TIMEOUT_S = 90.0


class Server:
    """`python -m serving` as a process, with its log events."""

    def __init__(self, model: str | Path, *flags: str, log: Path) -> None:
        self.log = log
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "serving", str(model), "--port", "0", "--poll-s", "0.1", *flags]
        with open(log, "w") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
        self.http = httpx.Client(timeout=60)
        self.url = f"http://127.0.0.1:{self.wait_for('listening')['port']}"

    def events(self, name: str) -> list[dict]:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def wait_for(self, name: str, *, count: int = 1) -> dict:
        self.wait_until(lambda: len(self.events(name)) >= count, f"{count} × '{name}'")
        return self.events(name)[count - 1]

    def wait_ready(self) -> "Server":
        self.wait_until(lambda: self.get("/health/ready").status_code == 200, "readiness")
        return self

    def wait_until(self, condition, what: str) -> None:
        end_s = time.monotonic() + START_TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, f"the server ended while waiting for {what}:\n{self.log.read_text()}"
            assert time.monotonic() < end_s, f"no {what}:\n{self.log.read_text()}"
            time.sleep(0.02)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(self.url + path)

    def metric(self, name: str) -> float:
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")

    def engine(self) -> psutil.Process:
        """The engine's process: suspended, it makes requests that last as long as a test likes."""
        (engine,) = psutil.Process(self.process.pid).children()
        return engine

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(timeout=START_TIMEOUT_S)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random package; read it only."""
    return make_package(tmp_path_factory.mktemp("package") / "tiny")


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Starts servers, and ends those that a test left running."""
    with contextlib.ExitStack() as stack:

        def start(model: str | Path, *flags: str) -> Server:
            server = Server(model, *flags, log=tmp_path_factory.mktemp("server") / "log.jsonl")
            stack.callback(server.process.wait)
            stack.callback(server.process.kill)
            return server

        yield start
