"""The rendered router configuration in the real Envoy, before real HTTP servers on this machine."""

import json
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from infra.components.alerts import UNSERVED
from infra.components.envoy import ADMIN_PORT, HTTP_PORT, METRICS_PORT, Backend, bootstrap
from infra.spec import Router
from tests.ports import free_ports

ENVOY = Path(sysconfig.get_path("scripts")) / "envoy"
CHAT = Backend(name="chat", host="chat-pods", port=8000, ready="/health/ready", paths=("/",), lingers=True)
CODE = Backend(name="code", host="code-pods", port=8000, ready="/health/ready", paths=("/",), lingers=True)


class Replica(ThreadingHTTPServer):
    """A server that answers with its own name, streams slowly, and can be not ready or draining."""

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.ready, self.draining, self.seen = name, True, False, 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Replica  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if self.path == "/health/ready":
            return self.answer(200 if self.server.ready else 503, b"")
        self.server.seen += 1
        if self.server.draining:
            return self.answer(503, b"draining")
        if self.path.startswith("/v1/stream"):
            return self.stream(pieces=12, every_s=0.25)
        return self.answer(200, json.dumps({"replica": self.server.name, "path": self.path}).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, *, pieces: int, every_s: float) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(pieces):
            piece = f"data: {number}\n\n".encode()
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.flush()
            time.sleep(every_s)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def started(*names: str) -> Iterator[list[Replica]]:
    servers = [Replica(name) for name in names]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    with started("a", "b") as servers:
        yield servers


@contextmanager
def envoy(
    directory: Path, router: Router, replicas: list[Replica], *, coders: list[Replica] | None = None, **manager: Any
) -> Iterator[tuple[httpx.Client, str]]:
    """Envoy with the rendered configuration, moved to free ports of this machine; yields a client and the metrics' URL.

    `coders`: those of a second service.
    """
    config = bootstrap(router, [CHAT, CODE] if coders else [CHAT])
    ports = dict(zip((HTTP_PORT, METRICS_PORT, ADMIN_PORT), free_ports(3), strict=True))
    moved = yaml.safe_dump(config)
    for port, free in ports.items():
        moved = moved.replace(f"port_value: {port}\n", f"port_value: {free}\n")
    config = yaml.safe_load(moved.replace("0.0.0.0", "127.0.0.1"))
    for cluster, servers in zip(config["static_resources"]["clusters"], (replicas, coders or ()), strict=False):
        endpoints = [
            {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": server.server_port}}}}
            for server in servers
        ]
        if endpoints:
            assignment = {"cluster_name": cluster["name"], "endpoints": [{"lb_endpoints": endpoints}]}
            cluster |= {"type": "STATIC", "load_assignment": assignment}
    public = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    public["common_http_protocol_options"] |= manager
    file = directory / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [ENVOY, "-c", file, "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"]
    process = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[HTTP_PORT]}", timeout=10, trust_env=False) as client:
            until(lambda: client.get("/chat/v1/x").status_code == 200)
            client.cookies = httpx.Cookies()
            yield client, f"http://127.0.0.1:{ports[METRICS_PORT]}"
    finally:
        process.kill()
        process.wait()


def until(true: Any) -> None:
    """Wait for `true()`, at most ten seconds."""
    for _ in range(100):
        try:
            if true():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail("it did not come about within ten seconds")


def test_a_stream_outlives_the_age_of_its_connection(tmp_path: Path, replicas: list[Replica]) -> None:
    """What lets the preStop hook drain: old connections are asked to close, streams on them are never cut."""
    router = Router()
    with (
        envoy(tmp_path, router, replicas, max_connection_duration="0.5s", idle_timeout="0.5s") as (client, _),
        client.stream("GET", "/v1/stream") as answer,
    ):
        pieces = "".join(answer.iter_text())
    assert pieces == "".join(f"data: {number}\n\n" for number in range(12))


def test_old_connections_are_asked_to_close(tmp_path: Path, replicas: list[Replica]) -> None:
    with envoy(tmp_path, Router(), replicas, max_connection_duration="0.2s") as (client, _):
        client.get("/v1/x")
        time.sleep(0.4)
        assert client.get("/v1/x").headers.get("connection") == "close"


def test_a_draining_replica_is_not_seen(tmp_path: Path, replicas: list[Replica]) -> None:
    with envoy(tmp_path, Router(policy="round_robin"), replicas) as (client, _):
        replicas[0].draining = True
        answers = [client.get("/v1/x") for _ in range(20)]
        assert {answer.status_code for answer in answers} == {200}
        assert replicas[0].seen > 0


def test_without_a_replica_the_answer_is_an_openai_error(tmp_path: Path, replicas: list[Replica]) -> None:
    def unserved(metrics: str) -> int:
        """As KEDA and the alerts read it: no server is there to count who found none."""
        wanted = f'{UNSERVED}{{envoy_cluster_name="chat"}} '
        (line,) = (one for one in httpx.get(f"{metrics}/metrics").text.splitlines() if one.startswith(wanted))
        return int(line.removeprefix(wanted))

    with envoy(tmp_path, Router(), replicas) as (client, metrics):
        assert unserved(metrics) == 0
        for replica in replicas:
            replica.ready = False
        until(lambda: client.get("/v1/x").status_code == 503)
        before = unserved(metrics)
        answer = client.get("/v1/x")
        assert unserved(metrics) == before + 1
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "path", ["/metrics", "//metrics", "/chat/metrics", "/v1/../metrics", "/%6detrics", "/chat%2Fmetrics"]
)
def test_metrics_of_the_servers_stay_inside(tmp_path: Path, replicas: list[Replica], path: str) -> None:
    with envoy(tmp_path, Router(), replicas) as (client, _):
        seen = sum(replica.seen for replica in replicas)
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            status = int(raw.makefile("rb").readline().split()[1])
    assert status in (400, 404)
    assert sum(replica.seen for replica in replicas) == seen


def test_a_services_name_is_taken_off_its_path(tmp_path: Path, replicas: list[Replica]) -> None:
    with envoy(tmp_path, Router(), replicas) as (client, _):
        assert client.get("/chat/v1/models").json()["path"] == "/v1/models"


@pytest.mark.parametrize("policy", ["least_request", "ring_hash", "maglev"])
def test_a_session_stays_with_its_replica(tmp_path: Path, replicas: list[Replica], policy: Any) -> None:
    with envoy(tmp_path, Router(policy=policy, cookie="session"), replicas) as (client, _):
        client.get("/v1/x")
        assert "session" in client.cookies
        assert len({client.get("/v1/x").json()["replica"] for _ in range(20)}) == 1


def test_a_client_of_two_services_has_a_session_with_each(tmp_path: Path, replicas: list[Replica]) -> None:
    """One cookie for both would name the replica of the one that was asked last."""
    router = Router(policy="round_robin", cookie="session")
    with started("c", "d") as coders, envoy(tmp_path, router, replicas, coders=coders) as (client, _):
        until(lambda: client.get("/code/v1/x").status_code == 200)
        met = [client.get(f"/{service}/v1/x").json()["replica"] for _ in range(6) for service in ("chat", "code")]
    assert [len(set(met[0::2])), len(set(met[1::2]))] == [1, 1]


def test_round_robin_uses_every_replica(tmp_path: Path, replicas: list[Replica]) -> None:
    with envoy(tmp_path, Router(policy="round_robin"), replicas) as (client, _):
        assert {client.get("/v1/x").json()["replica"] for _ in range(20)} == {"a", "b"}


def test_envoys_own_metrics_are_there_and_its_admin_is_not(tmp_path: Path, replicas: list[Replica]) -> None:
    with envoy(tmp_path, Router(), replicas) as (client, metrics):
        assert "envoy_cluster_upstream_rq" in httpx.get(f"{metrics}/metrics", trust_env=False).text
        assert httpx.get(f"{metrics}/ready", trust_env=False).status_code == 200
        for path in ("/", "/quitquitquit", "/config_dump", "/stats"):
            assert httpx.post(f"{metrics}{path}", trust_env=False).status_code == 404
        assert client.get("/v1/x").status_code == 200
