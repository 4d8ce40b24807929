"""Start, swap and stop, by real processes: nothing accepted is ever cut, and nothing is answered that cannot be."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
from conftest import ROOT, Server
from tiny_packages import make_package, point, publish

LONG = {"prompt": "def", "max_tokens": 240, "temperature": 0, "ignore_eos": True, "stream": True}


def events(server: Server, body: dict) -> list[str]:
    """A stream's events. Raises when it is not answered, or is cut before its `[DONE]`."""
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=90) as stream:
        assert stream.status_code == 200, stream.read()
        return [line.removeprefix("data: ") for line in stream.iter_lines() if line]


def refuse(*argv: object) -> str:
    """The one line that a refused command line ends with."""
    command = [sys.executable, "-m", "serving", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_channel_is_waited_for_followed_and_drained(tmp_path: Path, start_server) -> None:
    """The whole life of a server: no model yet, a broken one, a first, a second under load, SIGTERM under load.

    After SIGTERM it is not ready and answers still, as long as it lingers; then it refuses; and what it took it answers.
    """
    registry = tmp_path / "registry"
    channel = registry / "models" / "tiny" / "channels" / "production.json"
    server = start_server(channel, "--linger-s", "600", "--admin-port", "0")
    assert server.get("/health/live").status_code == 200
    answer = server.get("/health/ready")
    assert answer.status_code == 503
    assert "no model in the channel yet" in answer.text
    refused = httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    process = psutil.Process(server.process.pid)
    assert process.children() == []  # torch is in the engine's process, which is not there yet
    assert process.memory_info().rss < 150 * 2**20

    broken = publish(make_package(tmp_path / "broken", seed=9), registry)
    weights = registry / "models" / "tiny" / broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    point(registry, broken)
    assert str(weights) in server.wait_for("error")["message"]
    assert server.get("/health/ready").status_code == 503

    first = publish(make_package(tmp_path / "one", seed=1), registry)
    second = publish(make_package(tmp_path / "two", seed=2), registry)
    point(registry, first)
    server.wait_ready()
    assert server.get("/v1/models").json()["data"][0]["digest"] == first
    old_answer = events(server, {"model": "tiny", **LONG})

    answers: list[list[str]] = []
    swapped = threading.Event()

    def keep_asking() -> None:
        while not swapped.is_set():
            answers.append(events(server, {"model": "tiny", **LONG}))

    with ThreadPoolExecutor(4) as pool:
        askers = [pool.submit(keep_asking) for _ in range(4)]
        point(registry, second)
        try:
            server.wait_until(lambda: server.get("/health/ready").json().get("digest") == second, "the second model")
        finally:
            swapped.set()
        for asker in askers:
            asker.result()
    new_answer = events(server, {"model": "tiny", **LONG})
    texts = {text_of(answer) for answer in [*answers, old_answer, new_answer]}
    assert texts == {text_of(old_answer), text_of(new_answer)}  # every answer is all of one model
    assert text_of(old_answer) != text_of(new_answer)
    assert all(answer[-1] == "[DONE]" for answer in answers)
    server.wait_for("retired")
    assert f'model_info{{digest="{second}"}} 1.0' in server.get("/metrics").text
    assert first not in server.get("/metrics").text

    weights.unlink()
    point(registry, broken)  # what is served outlives a bad release
    server.wait_for("error", count=2)
    status = httpx.get(f"http://127.0.0.1:{server.wait_for('admin')['port']}/status").json()
    assert (status["digest"], str(weights) in status["why_not_newer"]) == (second, True)
    assert text_of(events(server, {"model": "tiny", **LONG})) == text_of(new_answer)

    engine = server.engine()
    with ThreadPoolExecutor(6) as pool, httpx.Client(timeout=90) as kept:
        # A connection from before the end, which uvicorn would keep alive.
        assert kept.get(server.url + "/health/live").headers.get("connection") != "close"
        server.terminate()
        server.wait_for("leaving")
        assert server.get("/health/ready").status_code == 503
        late = httpx.post(server.url + "/v1/completions", json={"model": "tiny", **LONG, "stream": False}, timeout=90)
        assert (late.status_code, late.headers["connection"]) == (200, "close")
        assert late.json()["choices"][0]["text"] == text_of(new_answer)
        engine.suspend()  # the streams last until it goes on
        streams = [pool.submit(events, server, {"model": "tiny", **LONG}) for _ in range(6)]
        server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 6, "six streams")
        httpx.post(f"http://127.0.0.1:{server.wait_for('admin')['port']}/drain")  # as if it had lingered long enough
        server.wait_for("draining")
        turned_away = kept.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert (turned_away.status_code, turned_away.headers["connection"]) == (503, "close")
        assert int(turned_away.headers["retry-after"]) >= 1
        engine.resume()
        assert {text_of(stream.result()) for stream in streams} == {text_of(new_answer)}
    assert server.wait() == 0
    assert server.events("drained") == [{**server.events("drained")[0], "cut": 0}]
    assert not engine.is_running()


def text_of(answer: list[str]) -> str:
    assert answer[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in answer[:-1])


def test_a_second_signal_ends_a_drain(tiny: Path, start_server) -> None:
    server = start_server(tiny, "--drain-s", "60").wait_ready()
    engine = server.engine()
    engine.suspend()  # a stream that would never end
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(httpx.post, server.url + "/v1/completions", json={"model": "tiny", **LONG}, timeout=90)
        server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 1, "the stream")
        server.terminate()
        server.wait_for("draining")
        server.terminate()
        assert server.wait() == 1
        assert isinstance(stream.exception(), httpx.HTTPError)
    engine.wait(timeout=30)


def test_a_stream_that_outlasts_the_drain_is_told(tiny: Path, start_server) -> None:
    server = start_server(tiny, "--drain-s", "0.5").wait_ready()
    server.engine().suspend()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(events, server, {"model": "tiny", **LONG})
        server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 1, "the stream")
        server.terminate()
        assert "interrupted" in stream.result()[-1]
    assert server.wait() == 1
    assert server.events("drained")[0]["cut"] == 1


def test_an_engine_that_dies_ends_its_streams_and_the_server(tiny: Path, start_server) -> None:
    server = start_server(tiny).wait_ready()
    engine = server.engine()
    engine.suspend()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(events, server, {"model": "tiny", **LONG})
        server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 1, "the stream")
        engine.kill()
        assert "engine_failed" in stream.result()[-1]
    assert server.wait() == 1


def test_a_registry_that_does_not_answer_holds_no_end_up(tmp_path: Path, start_server) -> None:
    digest = publish(make_package(tmp_path / "one"), tmp_path)
    weights = tmp_path / "models" / "tiny" / digest / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)  # whoever opens it waits for ever
    server = start_server(point(tmp_path, digest))
    server.wait_for("progress")
    server.terminate()
    assert server.wait() == 0


def test_a_killed_server_leaves_no_engine_behind(tiny: Path, start_server) -> None:
    server = start_server(tiny)
    server.wait_until(lambda: psutil.Process(server.process.pid).children() != [], "the engine")
    engine = server.engine()
    server.process.kill()
    engine.wait(timeout=30)


def test_refusals_are_one_line_and_exit_2(tiny: Path, tmp_path: Path, start_server) -> None:
    waiting = start_server(tmp_path / "channels" / "c.json")  # takes a port, and costs nothing else
    port = waiting.url.rpartition(":")[2]
    assert "no such model directory" in refuse(tmp_path / "nowhere")
    assert "config.json is missing" in refuse(tmp_path)
    assert f"127.0.0.1:{port}" in refuse(tiny, "--port", port)
    assert "--max-num-seqs" in refuse(tiny, "--max-num-seq", "4")
    short = make_package(tmp_path / "short")
    (short / "model.safetensors").write_bytes(b"\x00" * 7)
    assert "model.safetensors" in refuse(short, "--port", "0")
    assert str(tmp_path / "no.json") in refuse(tiny, "--port", "0", "--api-keys", tmp_path / "no.json")
    assert "--session-store" in refuse(tiny, "--port", "0", "--session-store", "ftp://x")
    assert "--files-dir" in refuse(tiny, "--port", "0", "--files-dir", short / "config.json")
    assert f"127.0.0.1:{port}" in refuse(tiny, "--port", "0", "--admin-port", port)
    waiting.terminate()
    assert waiting.wait() == 0
