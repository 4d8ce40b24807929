"""Who may ask, and how much: keys, quotas, tenants, the admin port, deadlines; and traces of what was asked."""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from conftest import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving import tracing
from serving.auth import Key, Keys
from serving.errors import Refused
from serving.limits import Quota

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 4, "ignore_eos": True}
LONG = {**BODY, "max_tokens": 240, "stream": True}
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def entry(name: str, **more: object) -> dict:
    return {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **more}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = [
        entry("ada"),
        entry("bob", requests_per_minute=2),
        entry("cat", requests_per_minute=4),
        entry("dan", requests_per_minute=2),
        entry("eve", tokens_per_minute=30),
        entry("old"),
        entry("low", priority="batch"),
    ]
    path.write_text(json.dumps({"keys": keys}))
    return path


@pytest.fixture(scope="module")
def spans() -> Iterator[tuple[str, list]]:
    """A collector of OpenTelemetry's traces: its address, and what it got."""
    got: list = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            raw = gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw
            request = ExportTraceServiceRequest.FromString(raw)
            got.extend(s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()


@pytest.fixture(scope="module")
def server(tiny: Path, start_server, key_file: Path, spans, tmp_path_factory: pytest.TempPathFactory) -> Server:
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = spans[0]
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "100"
    try:
        files = str(tmp_path_factory.mktemp("files"))
        flags = ("--api-keys", str(key_file), "--admin-port", "0", "--files-dir", files)
        return start_server(tiny, *flags, "--max-queued-tokens", "512").wait_ready()
    finally:
        del os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"], os.environ["OTEL_BSP_SCHEDULE_DELAY"]


def ask(server: Server, key: str | None, body: dict = BODY, **headers: str) -> httpx.Response:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return httpx.post(server.url + "/v1/completions", json=body, headers=headers, timeout=60)


def test_every_route_but_the_probes_and_the_way_in_asks_for_a_key(server: Server) -> None:
    document = httpx.get(server.url + "/openapi.json", headers={"authorization": "Bearer ada"}).json()
    open_routes = {"/health/live", "/health/ready", "/web/session", "/web/login", "/web/logout"}
    for path, methods in document["paths"].items():
        for method in methods:
            answer = server.http.request(method, server.url + path.replace("{", "").replace("}", ""))
            refused = answer.status_code == 401 and answer.json()["error"]["code"] in (
                "invalid_api_key",
                "not_logged_in",
            )
            assert refused != (path in open_routes) or path == "/web/login", (method, path, answer.text)
    assert ask(server, None).headers["www-authenticate"] == "Bearer"
    for wrong in ("-", "Ada", "ada ada", "é", "x" * 10_000):
        assert ask(server, None, authorization=b"Bearer " + wrong.encode()).status_code == 401, wrong  # type: ignore[arg-type]
    with openai.OpenAI(base_url=server.url + "/v1", api_key="ada", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
    with (
        openai.OpenAI(base_url=server.url + "/v1", api_key="no", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_session_is_found_among_any_cookies_and_for_its_own_page_alone(server: Server) -> None:
    def session(cookie: str, **headers: str) -> httpx.Response:
        return httpx.get(server.url + "/v1/models", headers={"cookie": cookie.encode(), **headers})  # type: ignore[dict-item]

    token = httpx.post(server.url + "/web/login", json={"key": "ada"}).cookies["slipway_session"]
    mine = f"slipway_session={token}"
    for cookie in (mine, f"other; {mine}", f'a={{"b": [1, 2]}}; {mine}; c', f"{mine}; ключ=1", f";;=; {mine}"):
        assert session(cookie).status_code == 200, cookie
        assert session(cookie, origin=server.url).status_code == 200
    for origin in ("http://[::1", "null", "https://elsewhere.example", ""):
        assert session(mine, origin=origin).status_code == 401
        refused = httpx.post(server.url + "/web/login", json={"key": "ada"}, headers={"origin": origin})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "cross_origin")
    assert (
        httpx.post(server.url + "/v1/completions/", json=BODY, headers={"authorization": "Bearer ada"}).status_code
        == 404
    )


def test_quotas_of_requests_and_of_tokens(server: Server) -> None:
    answers = [ask(server, "bob") for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert answers[1].headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    first, second = ask(server, "eve", {**BODY, "max_tokens": 100}), ask(server, "eve")
    assert (first.status_code, second.status_code) == (200, 429)  # the answer itself used up the minute, and more
    assert int(second.headers["retry-after"]) > 60
    assert ask(server, "ada").status_code == 200  # another's quota is another's


def test_what_makes_no_tokens_is_a_request_too(server: Server) -> None:
    key = {"authorization": "Bearer dan"}
    text, ids = {"model": "tiny", "prompt": "x"}, {"model": "tiny", "tokens": [5]}
    for path, body in (("tokenize", text), ("detokenize", ids)):
        assert httpx.post(f"{server.url}/v1/{path}", json=body, headers=key).status_code == 200
    refused = [httpx.post(f"{server.url}/v1/{path}", json={}, headers=key) for path in ("tokenize", "batches")]
    refused.append(httpx.post(server.url + "/v1/files", files={"file": b"{}"}, headers=key))
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(answer.headers["retry-after"]) >= 1
    assert httpx.get(server.url + "/v1/models", headers=key).status_code == 200


def test_a_key_of_the_class_batch_fills_half_the_queue(server: Server) -> None:
    engine = server.engine()
    with contextlib.ExitStack() as streams:

        def opened(key: str) -> int:
            body = {**BODY, "prompt": [5] * 120, "stream": True}
            headers = {"authorization": f"Bearer {key}"}
            asked = httpx.stream("POST", server.url + "/v1/completions", json=body, headers=headers, timeout=60)
            return streams.enter_context(asked).status_code

        engine.suspend()
        streams.callback(engine.resume)
        assert [opened(key) for key in ("low", "low", "low", "ada", "ada", "ada")] == [200, 200, 429, 200, 200, 429]


def test_keys_are_read_again_and_bad_ones_change_nothing(server: Server, key_file: Path) -> None:
    good = json.loads(key_file.read_text())
    assert ask(server, "old").status_code == 200
    key_file.write_text(json.dumps({"keys": [k for k in good["keys"] if k["name"] != "old"] + [entry("new")]}))
    server.wait_until(lambda: ask(server, "new").status_code == 200, "the new key")
    assert ask(server, "old").status_code == 401
    key_file.write_text("{")
    server.wait_until(lambda: ask(server, "new").status_code == 200 and bool(server.events("error")), "the complaint")
    assert "stay in force" in server.events("error")[0]["message"]


def test_files_are_their_tenants_own(server: Server) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="ada", max_retries=0) as client:
        file = client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="new", max_retries=0) as other:
        assert list(other.files.list()) == []
        with pytest.raises(openai.NotFoundError):
            other.files.retrieve(file.id)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def test_a_batch_is_on_its_keys_quota(server: Server) -> None:
    """Its file, itself and its lines use up what the key may ask in a minute."""
    lines = [{"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": BODY} for n in range(2)]
    with openai.OpenAI(base_url=server.url + "/v1", api_key="cat", max_retries=0) as client:
        text = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("in.jsonl", text), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        server.wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", "the batch")
    assert ask(server, "cat").status_code == 429
    told = [event for event in server.events("request") if event.get("key") == "cat"]
    assert [event["outcome"] for event in told] == ["length", "length"]


def test_deadlines_end_what_waits_and_what_streams(server: Server) -> None:
    engine = server.engine()
    engine.suspend()
    late = {"x-request-timeout-s": "0.2"}
    whole = ask(server, "ada", BODY, **late)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
    stream = ask(server, "ada", LONG, **late)
    assert stream.status_code == 200
    assert "deadline_exceeded" in stream.text.splitlines()[-2]
    engine.resume()
    assert ask(server, "ada", BODY, **{"x-request-timeout-s": "-1"}).status_code == 400
    assert server.events("request")[-1]["outcome"] == "deadline"


def test_the_admin_port_tells_and_needs_no_key(server: Server, tiny: Path) -> None:
    port = server.wait_for("admin")["port"]
    status = httpx.get(f"http://127.0.0.1:{port}/status").json()
    assert (status["model"], status["ready"], status["draining"]) == ("tiny", True, False)
    assert len(status["engines"]) == 1
    assert "slipway_serve_itl_seconds_count" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
    for body in (b"\xff", b"{}", b'{"source": 1}', b'{"source": "/nowhere"}', b'{"source": "x", "sauce": "y"}'):
        refused = httpx.put(f"http://127.0.0.1:{port}/adapters/a", content=body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error"), body
    assert httpx.get(f"http://127.0.0.1:{port}/nowhere").json()["error"]["code"] == "not_found"
    assert httpx.get(server.url + "/status", headers={"authorization": "Bearer ada"}).status_code == 404


def test_traces_reach_the_log_and_the_collector_and_admin_drains(server: Server, spans: tuple[str, list]) -> None:
    """Last in the file: the drain ends the server, which sends the spans that it still has."""
    assert ask(server, "ada", traceparent=TRACE).status_code == 200
    server.wait_until(lambda: any(e.get("trace_id") for e in server.events("request")), "the log")
    told = next(e for e in server.events("request") if e.get("trace_id"))
    assert (told["trace_id"], told["key"]) == (TRACE.split("-")[1], "ada")
    httpx.post(f"http://127.0.0.1:{server.wait_for('admin')['port']}/drain")
    assert server.wait() == 0
    (span,) = [s for s in spans[1] if s.trace_id.hex() == TRACE.split("-")[1]]
    assert span.parent_span_id.hex() == TRACE.split("-")[2]
    assert {a.key for a in span.attributes} >= {"gen_ai.request.model", "gen_ai.usage.output_tokens"}
    assert span.end_time_unix_nano > span.start_time_unix_nano


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 200), st.integers(0, 300)), max_size=30))
def test_a_quota_never_gives_more_than_its_rate(steps: list[tuple[float, int, int]]) -> None:
    """A bucket's worth, the rate, and one answer that could not be known before; and who waits as told is let in."""
    now_s = [0.0]
    quota = Quota(Key(name="k", sha256="0" * 64, tokens_per_minute=100), clock=lambda: now_s[0])
    taken = 0
    for pause_s, prompt_tokens, output_tokens in steps:
        now_s[0] += pause_s
        short = quota.admit(prompt_tokens)
        if short is not None:
            now_s[0] += short[1]
            assert quota.admit(prompt_tokens) is None
        assert taken <= 100 + now_s[0] * 100 / 60  # before this one: all that was taken has been paid for
        taken += max(prompt_tokens + output_tokens, 1)
        quota.charge(output_tokens)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "malformed"),
        ('{"keys": [{"name": "a", "sha256": "x"}]}', "sha256"),
        (json.dumps({"keys": [entry("a"), entry("a")]}), "one name"),
    ],
)
def test_bad_key_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(Refused, match=says):
        Keys(path)
    with pytest.raises(Refused, match="cannot be read"):
        Keys(tmp_path / "nowhere")


@given(st.text(max_size=60))
def test_any_traceparent_is_read_or_ignored(text: str) -> None:
    assert tracing.parse(text) is None
    trace = tracing.parse(TRACE)
    assert trace is not None
    assert (trace.trace_id, trace.sampled) == (TRACE.split("-")[1], True)
