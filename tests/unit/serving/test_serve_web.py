"""The chat page, in a real browser: log in, ask, stop, come back on another replica, log out."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, Server
from tiny_packages import make_package

from tests.redis_server import redis_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")


def make_key(name: str, *flags: str) -> tuple[str, dict]:
    """A key and its entry, as the command makes them."""
    command = [sys.executable, "-m", "serving.auth", name, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stderr.split()[-1], json.loads(done.stdout)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def page() -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(color_scheme="light", viewport={"width": 1100, "height": 720})
        page = context.new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@needs_browser
def test_a_person_logs_in_asks_stops_comes_back_and_logs_out(
    tiny: Path, tmp_path: Path, start_server, redis_url: str, page
) -> None:
    secret, entry = make_key("ada")
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [entry]}))
    flags = ("--api-keys", str(keys), "--session-store", redis_url)
    first: Server = start_server(tiny, *flags).wait_ready()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))

    page.goto(first.url + "/")
    page.fill("#key", "sk-slipway-wrong")
    page.click("text=Log in")
    page.wait_for_selector("#login-error:not(:empty)")
    assert page.is_hidden("#app")
    page.fill("#key", secret)
    page.click("text=Log in")
    page.wait_for_selector("#app:not([hidden])")
    assert page.inner_text("#user") == "ada"
    page.wait_for_selector("#model option", state="attached")
    assert page.input_value("#model") == "tiny"

    page.click("summary")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "24")
    page.fill("#prompt", "<b>Hello</b>")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#messages .note")
    assert page.inner_text("#messages .user") == "<b>Hello</b>"  # shown as text
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "<b>Hello</b>"}],
        "temperature": 0,
        "top_p": 0.95,
        "max_tokens": 24,
    }
    whole = httpx.post(
        first.url + "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {secret}"}, timeout=60
    )
    assert page.text_content("#messages .assistant") == whole.json()["choices"][0]["message"]["content"]
    page.wait_for_selector("#history div")

    page.fill("#max_tokens", "")
    engine = first.engine()
    page.fill("#prompt", "Go on")
    engine.suspend()  # so that there is something to stop
    page.click("#send")
    page.wait_for_selector("#stop:not([hidden])")
    page.click("#stop")
    page.wait_for_selector("#send:not([hidden])")
    engine.resume()
    page.wait_for_selector("text=Stopped")

    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before

    cookies = page.context.cookies()
    assert [(c["httpOnly"], c["sameSite"]) for c in cookies if c["name"] == "slipway_session"] == [(True, "Strict")]
    # Another replica, which has never seen this browser, and which has no model yet.
    second: Server = start_server(tmp_path / "tiny" / "channels" / "production.json", *flags)
    page.goto(second.url + "/")
    page.click("#history button")
    page.wait_for_selector("#messages .user")
    assert page.inner_text("#messages .user >> nth=0") == "<b>Hello</b>"
    for width in (390, 1100):  # nothing sticks out, on a telephone either
        page.set_viewport_size({"width": width, "height": 720})
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    token = next(c["value"] for c in cookies if c["name"] == "slipway_session")
    with_cookie = {"cookie": f"slipway_session={token}"}
    assert httpx.get(first.url + "/v1/models", headers=with_cookie).status_code == 200
    elsewhere = {**with_cookie, "origin": "https://elsewhere.example"}
    assert httpx.get(first.url + "/v1/models", headers=elsewhere).status_code == 401
    assert httpx.post(first.url + "/web/logout", headers=elsewhere).status_code == 403
    page.click("#logout")
    page.wait_for_selector("#login:not([hidden])")
    assert httpx.get(first.url + "/v1/models", headers=with_cookie).status_code == 401  # ended everywhere
    assert problems == []
    assert first.events("error") == second.events("error") == []


@needs_browser
def test_without_keys_a_browser_keeps_its_own_conversations(tiny: Path, start_server, page) -> None:
    server: Server = start_server(tiny).wait_ready()
    page.context.clear_cookies()
    page.goto(server.url + "/")
    page.wait_for_selector("#app:not([hidden])")
    page.fill("#prompt", "Hello")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#history div")
    page.reload()
    page.wait_for_selector("#history div")
    page.click("#history .forget")
    page.wait_for_selector("#history div", state="detached")
    assert httpx.get(server.url + "/web/conversations").json() == {"conversations": []}


@needs_browser
def test_an_answer_that_is_left_stays_with_its_own_conversation(tmp_path: Path, start_server, page) -> None:
    server: Server = start_server(make_package(tmp_path / "tiny", max_position_embeddings=2048)).wait_ready()
    page.context.clear_cookies()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)

    def kept() -> list[dict]:
        return page.evaluate("fetch('/web/conversations').then((a) => a.json())")["conversations"]

    def ask(text: str) -> None:
        page.fill("#prompt", text)
        page.press("#prompt", "Enter")

    page.goto(server.url + "/")
    page.wait_for_selector("#model option", state="attached")
    page.click("summary")
    page.fill("#max_tokens", "40")
    ask("x" * 79 + "🙂 and " + "a\n" * 24 + "b")  # its title ends with a character of two halves
    page.wait_for_selector("#messages .note")
    page.wait_for_selector("#history div")
    assert kept()[0]["title"] == "x" * 79 + "🙂"
    bottom = "(m => m.scrollHeight - m.scrollTop - m.clientHeight)(document.getElementById('messages'))"
    assert page.evaluate(bottom) < 40

    engine = server.engine()
    engine.suspend()
    ask("What next?")
    page.wait_for_selector("#stop:not([hidden])")
    page.click("#history button")  # of the conversation that is open: nothing is lost
    assert page.is_visible("#stop")
    page.click("#stop")
    page.wait_for_selector("text=Stopped")
    assert page.input_value("#prompt") == "What next?"  # it was not answered, so it may be asked again
    page.press("#prompt", "Enter")
    page.wait_for_selector("#stop:not([hidden])")
    page.click("#new")
    page.wait_for_selector("#stop", state="hidden")
    engine.resume()
    assert page.query_selector_all("#messages li") == []
    assert page.input_value("#prompt") == ""
    assert [m["role"] for m in kept()[0]["messages"]] == ["user", "assistant"]

    page.click("#history button")
    engine.suspend()
    ask("And then?")
    page.wait_for_selector("#stop:not([hidden])")
    page.click("#history .forget")
    page.wait_for_selector("#history div", state="detached")
    engine.resume()
    assert kept() == []  # the answer that was on its way brought nothing back
    assert problems == []


def test_a_store_that_goes_and_comes_back_is_told_once(tiny: Path, tmp_path: Path, start_server) -> None:
    key, entry = make_key("ada")
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [entry]}))
    ask = {"model": "tiny", "prompt": "x", "max_tokens": 4}
    with httpx.Client(timeout=60) as browser:

        def session() -> httpx.Response:
            return browser.get(server.url + "/web/session")

        with redis_server(tmp_path) as url:
            flags = ("--api-keys", str(keys), "--session-store", url, "--kv-spill", url)
            server: Server = start_server(tiny, *flags).wait_ready()
            assert browser.post(server.url + "/web/login", json={"key": key}).status_code == 200
            assert browser.post(server.url + "/v1/completions", json=ask).status_code == 200
        for _ in range(3):
            assert (session().status_code, session().json()["error"]["code"]) == (503, "sessions_unavailable")
        assert browser.get(server.url + "/").status_code == 200
        asked = httpx.post(
            server.url + "/v1/completions", json=ask, headers={"authorization": f"Bearer {key}"}, timeout=60
        )
        assert (asked.status_code, server.get("/health/ready").status_code) == (200, 200)
        assert [event["store"] for event in server.events("store_away")].count("sessions") == 1
        metrics = httpx.get(server.url + "/metrics", headers={"authorization": f"Bearer {key}"}).text
        assert 'slipway_serve_store_failures_total{store="sessions"} 6.0' in metrics
        with redis_server(tmp_path, port=int(url.split(":")[2].split("/")[0])):
            assert session().json()["user"] is None  # it came back empty
            assert browser.post(server.url + "/web/login", json={"key": key}).status_code == 200
            assert session().json()["user"] == "ada"
        assert len(server.events("store_back")) == 1
