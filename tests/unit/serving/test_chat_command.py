"""`slipway chat` against the real server: it streams what the API answers, keeps the conversation, and says why it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, Server

ASKED = {"model": "pylib", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def server(tiny: Path, start_server) -> Server:
    return start_server(tiny, "--served-name", "pylib").wait_ready()


def chat(*words: str, url: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infra.cli.main", "chat", *words, "-s", "local", "--url", url]
    settings = ["--max-tokens", "12", "--temperature", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *settings], cwd=ROOT, env=environment, input=said, capture_output=True, text=True, timeout=90
    )


def answer(server: Server, *messages: tuple[str, str]) -> str:
    body = {**ASKED, "messages": [{"role": role, "content": content} for role, content in messages]}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    return reply.json()["choices"][0]["message"]["content"]


def test_one_message_is_answered_on_stdout(server: Server) -> None:
    done = chat("hello", "--system", "Be brief.", url=server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer(server, ("system", "Be brief."), ("user", "hello")) + "\n"


def test_a_conversation_remembers_what_was_said(server: Server) -> None:
    done = chat(url=server.url, said="one\ntwo\n")
    assert done.returncode == 0, done.stderr
    first = answer(server, ("user", "one"))
    second = answer(server, ("user", "one"), ("assistant", first), ("user", "two"))
    assert done.stdout == f"{first}\n{second}\n"


def test_a_service_that_is_not_there_names_those_that_are(server: Server) -> None:
    done = chat("x", "--service", "chta", url=server.url)
    assert done.returncode == 2
    assert "did you mean 'chat'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_endpoint_that_does_not_answer_is_one_line() -> None:
    done = chat("x", url="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "the endpoint does not answer" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
