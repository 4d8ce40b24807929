"""Hostile clients at the level of bytes: slow, endless, half-gone. Each is refused, and nobody else notices."""

import contextlib
import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import Server
from tiny_packages import make_package, point, publish

from serving.api.app import BYTES_PER_TOKEN
from serving.connections import HEAD_LIMIT_BYTES, HEAD_TIMEOUT_S

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 4, "ignore_eos": True}
QUEUED_TOKENS = 100_000
BODY_LIMIT_BYTES = BYTES_PER_TOKEN * QUEUED_TOKENS
ANSWER_S = HEAD_TIMEOUT_S + 30


@pytest.fixture(scope="module")
def server(tiny: Path, start_server) -> Server:
    """One that answers two at a time, so that streams can be many and idle."""
    return start_server(tiny, "--max-num-seqs", "2", "--max-queued-tokens", str(QUEUED_TOKENS)).wait_ready()


@pytest.fixture
def raw(server: Server) -> Iterator:
    """`raw(bytes)` sends them on a connection of its own and returns it."""
    open_sockets: list[socket.socket] = []

    def connect(data: bytes) -> socket.socket:
        host, port = server.url.removeprefix("http://").split(":")
        sock = socket.create_connection((host, int(port)), timeout=ANSWER_S)
        open_sockets.append(sock)
        sock.sendall(data)
        return sock

    yield connect
    for sock in open_sockets:
        sock.close()


def answer(sock: socket.socket) -> tuple[int, dict]:
    """Everything that comes until the server hangs up: the status and the JSON body."""
    data = b""
    while piece := sock.recv(65536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "host: x", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.fixture(scope="module")
def slow(server: Server) -> Iterator[list[socket.socket]]:
    """Connections whose heads never end, begun before the other tests and refused while those run."""
    host, port = server.url.removeprefix("http://").split(":")
    connections = [socket.create_connection((host, int(port)), timeout=ANSWER_S) for _ in range(50)]
    for sock in connections:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
    yield connections
    for sock in connections:
        sock.close()


def test_endless_heads_are_refused_while_others_are_answered(server: Server, slow: list, raw) -> None:
    for sock in slow:
        sock.sendall(b"x-a: 1\r\n")  # another header now and then keeps no connection open
    endless = raw(b"GET / HTTP/1.1\r\nx: ")
    endless.sendall(b"a" * (HEAD_LIMIT_BYTES + 65536))
    status, error = answer(endless)
    assert (status, set(error["error"])) == (431, {"message", "type", "param", "code"})
    assert httpx.post(server.url + "/v1/completions", json=BODY, timeout=60).status_code == 200


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n", b"FOO BAR\r\n\r\n",
     b"POST / HTTP/1.1\r\ncontent-length: -5\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
     b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n"],
    ids=["tls", "version", "method", "length", "smuggling", "not ascii", "no path"],
)  # fmt: skip
def test_what_is_no_http_gets_400(server: Server, raw, data: bytes) -> None:
    status, error = answer(raw(data))
    assert (status, error["error"]["type"]) == (400, "invalid_request_error")


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(server: Server, raw) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    declared = raw(f"{head}content-length: {BODY_LIMIT_BYTES + 1}\r\n\r\n".encode())  # and not a byte of it
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    chunked = raw(f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunk * (BODY_LIMIT_BYTES // 0x10000 + 1))
    for sock in (declared, chunked):
        status, error = answer(sock)
        assert (status, error["error"]["code"]) == (413, "request_too_large")
    sent = httpx.post(server.url + "/v1/completions", content=b"x" * 3 * BODY_LIMIT_BYTES, timeout=60)
    assert sent.status_code == 413
    small = raw(post(b"{}") + post(json.dumps(BODY).encode(), "connection: close"))
    assert [part.split()[0] for part in small.recv(65536).split(b"HTTP/1.1 ")[1:2]] == [b"400"]  # and goes on


def test_half_closed_and_vanished_clients_leave_nothing_behind(server: Server, raw) -> None:
    long = json.dumps({**BODY, "max_tokens": 240, "stream": True}).encode()
    engine = server.engine()
    engine.suspend()
    half = raw(post(long))
    server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 1, "the stream")
    half.shutdown(socket.SHUT_WR)
    cut = raw(post(long)[:-20])  # a body that never ends
    cut.shutdown(socket.SHUT_WR)
    server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 0, "both to be forgotten")
    engine.resume()
    assert httpx.post(server.url + "/v1/completions", json=BODY, timeout=60).status_code == 200


def test_requests_in_one_packet_are_answered_in_order(server: Server, raw) -> None:
    """Pipelined: the timer of a request's head belongs to that request."""
    sock = raw(post(json.dumps(BODY).encode()) * 2 + post(b"{", "connection: close"))
    data = b""
    while piece := sock.recv(65536):
        data += piece
    statuses = [int(part.split()[0]) for part in data.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 200, 400]


def test_a_thousand_idle_streams_cost_little_and_leave_nothing(server: Server) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    processes = [psutil.Process(server.process.pid), server.engine()]
    host, port = server.url.removeprefix("http://").split(":")
    asked = post(json.dumps({**BODY, "max_tokens": 250, "stream": True}).encode())

    def used_bytes() -> int:
        return sum(process.memory_info().rss for process in processes)

    def in_flight() -> float:
        return server.metric("slipway_serve_requests_in_flight")

    before_bytes = used_bytes()
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection((host, int(port)))).sendall(asked)
        server.wait_until(lambda: in_flight() > 900, "the streams")
        assert used_bytes() - before_bytes < 200 * 2**20
        assert server.get("/health/ready").status_code == 200
    server.wait_until(lambda: in_flight() == 0, "the streams to be forgotten")


HOSTILE_STRUCTURES = {
    "regex that backtracks": {"type": "regex", "regex": "(a*)*(a*)*(a*)*b" * 20},
    "regex that explodes": {"type": "regex", "regex": "(((a{1000}){1000}){1000}){1000}"},
    "regex that is none": {"type": "regex", "regex": "(["},
    "grammar that is none": {"type": "grammar", "grammar": "start: nothing"},
    "schema of nonsense": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "zebra"}}},
    "schema that is huge": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a" * 70_000]}}},
    "schema that is deep": {"type": "json_schema", "json_schema": {"name": "x", "schema": None}},
}


def deep_schema(levels: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("name", HOSTILE_STRUCTURES)
def test_hostile_structures_are_answered_and_others_go_on(server: Server, name: str) -> None:
    asked = json.loads(json.dumps(HOSTILE_STRUCTURES[name]))
    if name == "schema that is deep":
        asked["json_schema"]["schema"] = deep_schema(90)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for stream in (False, True):
            made = client.post("/v1/completions", json={**BODY, "response_format": asked, "stream": stream})
            assert made.status_code in (200, 400), made.text
            if name != "regex that backtracks":
                assert made.status_code == 400, made.text
        assert client.post("/v1/completions", json=BODY).status_code == 200


def test_too_little_memory_refuses_before_anything_is_read(tiny: Path, tmp_path: Path, start_server) -> None:
    """And a second model is not loaded beside the first: it is said, and the first one stays."""
    first, second = publish(tiny, tmp_path), publish(make_package(tmp_path / "next", seed=2), tmp_path)
    hungry: Server = start_server(point(tmp_path, first), "--min-free-bytes", "100000GiB")
    hungry.wait_for("serving")
    point(tmp_path, second)
    assert "beside the old one" in hungry.wait_for("error")["message"]
    assert hungry.get("/v1/models").json()["data"][0]["digest"] == first
    unready = hungry.get("/health/ready")
    assert (unready.status_code, unready.json()["status"]) == (503, "overloaded")  # it would refuse whoever is sent
    assert hungry.metric("slipway_serve_ready") == 0
    refused = httpx.post(hungry.url + "/v1/completions", json=BODY, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert hungry.get("/health/live").status_code == 200
    assert hungry.metric("slipway_serve_memory_free_bytes") > 0


def test_slow_heads_are_refused_and_forgotten(server: Server, slow: list) -> None:
    assert {answer(sock)[0] for sock in slow} == {408}
    process = psutil.Process(server.process.pid)
    server.wait_until(lambda: len(process.net_connections("tcp")) < len(slow), "the connections to close")


def test_the_server_lives_and_had_no_error_of_its_own(server: Server) -> None:
    assert server.events("error") == []
    assert server.process.poll() is None
    assert server.metric('slipway_serve_requests_total{outcome="error"}') == 0
