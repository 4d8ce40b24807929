"""What goes wrong on a machine, and what must come of it."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.integration.spine.conftest import Project


def wait_for(what: Callable[[], Any], *, seconds: float = 120) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"nothing of {what} in {seconds} s")


def train_steps(project: Project) -> list[int]:
    return [
        event["step"]
        for event in project.events("train-")
        if event.get("event") == "progress" and event.get("stage") == "train"
    ]


def final_loss(project: Project) -> float:
    return [
        event["loss"]
        for event in project.events("train-")
        if event.get("event") == "progress" and event.get("stage") == "train"
    ][-1]


def test_killed_rank_resumes_to_the_same_loss_to_the_bit(project: Project, served: Project) -> None:
    project.write(training__data={**_data_of(served)})
    up = project.start("local", "up")
    wait_for(lambda: any(step >= 30 for step in train_steps(project)))
    victim = project.ranks()[-1]
    victim.send_signal(signal.SIGKILL)
    stderr = up.communicate(timeout=240)[1]
    assert up.returncode == 0, stderr
    assert any(event["event"] == "resumed" for event in project.events("train-"))
    assert final_loss(project) == final_loss(served)


def _data_of(served: Project) -> dict[str, Any]:
    return {
        "source": {"kind": "text", "path": str(served.folder / "corpus"), "glob": "*.txt"},
        "vocab_size": 320,
        "held_out": 0.2,
    }


def test_interrupt_leaves_nothing_and_the_next_up_resumes(project: Project) -> None:
    up = project.start("local", "up")
    wait_for(lambda: any(step >= 30 for step in train_steps(project)))
    os.killpg(up.pid, signal.SIGINT)
    up.communicate(timeout=60)
    assert up.returncode == 130
    assert project.processes() == []
    project.slipway("local", "up")
    assert any(event["event"] == "resumed" for event in project.events("train-"))


def test_client_sees_no_error_while_a_replica_is_stopped(served: Project) -> None:
    client = openai.OpenAI(base_url=f"{served.endpoint}/v1", api_key="none", max_retries=0)
    failures: list[str] = []
    answered: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                chunks = list(client.completions.create(model="tiny", prompt="the ", max_tokens=40, stream=True))
                assert chunks[-1].choices[0].finish_reason in ("length", "stop")
                answered.append(1)
            except Exception as error:
                failures.append(repr(error))
                return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answered) >= 8, seconds=60)
    pod = served.workloads()["chat"]["pods"][0]
    os.kill(pod["pids"][0], signal.SIGTERM)
    wait_for(lambda: len(answered) >= 40, seconds=60)
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []


def test_refused_gate_publishes_nothing(project: Project) -> None:
    project.write(training__gate={"must_beat": None, "max_bits_per_byte": 0.001})
    refused = project.slipway("local", "up", exit_code=2)
    assert "0.001" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert project.processes() == []
    assert not list(project.state.glob("volumes/*/models/*/channels/*.json"))


def test_two_ups_at_once(project: Project) -> None:
    first = project.start("local", "up")
    wait_for(project.processes, seconds=30)
    second = project.slipway("local", "up", exit_code=2)
    assert "another `up` is under way" in second.stderr
    os.killpg(first.pid, signal.SIGINT)
    first.communicate(timeout=60)


def test_port_in_use_is_refused_before_anything_runs(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", project.port))
        taken.listen()
        refused = project.slipway("local", "up", exit_code=2)
    assert str(project.port) in refused.stderr
    assert project.processes() == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training__data": {"source": {"kind": "text", "path": "/nowhere"}, "vocab_size": 320}}, "/nowhere"),
        ({"training__stepz": 3}, "did you mean `steps`"),
        ({"training__seq": 4096}, "max_context 64"),
        ({"training__global_batch": 7}, "global_batch"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(project: Project, changes: dict[str, Any], says: str) -> None:
    project.write(**changes)
    refused = project.slipway("local", "up", exit_code=2)
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr
    assert project.processes() == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00bad"], ids=["empty", "not UTF-8"])
def test_bad_corpus_is_refused(project: Project, content: bytes) -> None:
    for file in (project.folder / "corpus").iterdir():
        file.write_bytes(content)
    refused = project.slipway("local", "up", exit_code=2)
    assert "corpus" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert project.processes() == []


def test_unwritable_registry_is_refused(project: Project) -> None:
    volume = project.state / "volumes" / "registry"
    volume.parent.mkdir(parents=True)
    volume.mkdir()
    (volume / "models").write_text("in the way")
    refused = project.slipway("local", "up", exit_code=2)
    assert "registry" in refused.stderr
    assert project.processes() == []
