"""The real Envoy with a rendered configuration, before real HTTP servers, with its endpoints in a file as on one machine."""

import json
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from infra.components.envoy import ADMIN_PORT, HTTP_PORT, METRICS_PORT, Backend, bootstrap
from infra.local import envoy as local_envoy
from infra.spec import Router
from tests.ports import free_ports

ENVOY = Path(sysconfig.get_path("scripts")) / "envoy"
CHAT = Backend(name="chat", host="chat-pods", port=8000, ready="/health/ready", paths=("/",), lingers=True)
PERIOD_S = 0.02


class Replica(ThreadingHTTPServer):
    """A server that says its name. `slow_s`: what an answer takes; `status`: what it answers; `cut`: it breaks connections."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, name: str, *, slow_s: float = 0.0, status: int = 200, cut: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.slow_s, self.status, self.cut = name, slow_s, status, cut
        self.seen, self.ready = 0, True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Replica  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if self.path == "/health/ready":
            return self.answer(200 if self.server.ready else 503, b"")
        return self.work()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        return self.work()

    def work(self) -> None:
        self.server.seen += 1
        if self.server.cut:
            self.close_connection = True
            return None
        time.sleep(self.server.slow_s)
        if self.path == "/v1/stream":
            return self.break_off()
        return self.answer(self.server.status, json.dumps({"replica": self.server.name}).encode())

    def break_off(self) -> None:
        """Half an answer, and then the connection is gone."""
        self.send_response(200)
        self.send_header("content-length", "1000")
        self.end_headers()
        self.wfile.write(b"data: 1\n\n")
        self.wfile.flush()
        self.close_connection = True

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class Routed:
    """Envoy on this machine. `show` replaces the replicas behind it, as a change of the endpoints does."""

    def __init__(self, router: Router, directory: Path) -> None:
        ports: dict[int, int] = dict(zip((HTTP_PORT, METRICS_PORT, ADMIN_PORT), free_ports(3), strict=True))
        config, (self._endpoints,) = local_envoy.rewrite(
            bootstrap(router, [CHAT]),
            names_service=lambda host, _: host == CHAT.host,
            own_ports=ports,
            rewrite_text=lambda text: text,
            directory=directory,
        )
        self.url, self._admin = f"http://127.0.0.1:{ports[HTTP_PORT]}", f"http://127.0.0.1:{ports[METRICS_PORT]}"
        self._file = directory / "envoy.yaml"
        self._file.write_text(yaml.safe_dump(config))
        self._process: subprocess.Popen[bytes] | None = None
        self._shown: set[Replica] = set()

    def show(self, *replicas: Replica) -> None:
        """Returns when Envoy sends to these and to no others. Whoever is shown no more says that it is not ready."""
        self.name(*replicas)
        for gone in self._shown - set(replicas):
            gone.ready = False
        self._shown = set(replicas)
        until(lambda: self.stat("membership_total") == self.stat("membership_healthy") == len(replicas))

    def name(self, *replicas: Replica) -> None:
        """The addresses that Envoy is told of, from now on."""
        text = self._endpoints.render(lambda _host, _port: [replica.server_port for replica in replicas])
        beside = self._endpoints.path.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self._endpoints.path)
        if self._process is None:
            words = ["-c", str(self._file), "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"]
            self._process = subprocess.Popen([ENVOY, *words])

    def stat(self, name: str) -> float:
        text = httpx.get(f"{self._admin}/metrics", trust_env=False).text
        found = [
            line for line in text.splitlines() if line.startswith(f'envoy_cluster_{name}{{envoy_cluster_name="chat"}}')
        ]
        return float(found[0].split()[-1]) if found else -1

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False)

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def replica() -> Iterator[Callable[..., Replica]]:
    """`replica("a", slow_s=0.1)`: a server of its own."""
    made: list[Replica] = []

    def make(name: str, **keys: Any) -> Replica:
        server = Replica(name, **keys)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        made.append(server)
        return server

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.fixture
def routed(tmp_path: Path) -> Iterator[Callable[..., Routed]]:
    """`routed(policy="maglev", …)`: Envoy as that router's spec makes it."""
    made: list[Routed] = []

    def make(**keys: Any) -> Routed:
        made.append(Routed(Router(**keys), tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def until(true: Callable[[], bool], within_s: float = 15) -> None:
    """Wait for `true()`."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        try:
            if true():
                return
        except httpx.TransportError:
            pass
        time.sleep(PERIOD_S)
    pytest.fail(f"it did not come about within {within_s} seconds")
