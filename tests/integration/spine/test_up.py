"""`slipway local up` from nothing to a served model, and again, and after changes: only what a change touches is run."""

import json
import socket

import httpx
import openai
import pytest

from tests.integration.spine.conftest import Project


@pytest.fixture
def client(served: Project) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.endpoint}/v1", api_key="none", max_retries=0)


def test_openai_client_streams_from_the_endpoint(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt="the ", max_tokens=8, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert "".join(chunk.choices[0].text for chunk in chunks)


def test_metrics_are_not_published(served: Project) -> None:
    assert httpx.get(f"{served.endpoint}/metrics").status_code == 404


def test_second_up_changes_nothing(served: Project) -> None:
    before = {process.pid for process in served.processes()}
    document = json.loads(served.slipway("local", "up", "--json").stdout)
    assert {process.pid for process in served.processes()} == before
    assert document["endpoint"] == served.endpoint
    assert document["evaluation"]["bits_per_byte"] < document["evaluation"]["baselines"]["unigram"]
    # Progress is told a few times a second, so how many points there are is the machine's.
    assert max(map(int, document["curve"])) == 120
    assert len(document["curve"]) >= 3


def test_changes_run_only_what_they_touch(served: Project) -> None:
    jobs = {name for name in served.workloads() if name.split("-")[0] in ("data", "train", "promote")}
    replicas = {pod["name"]: pod["pids"] for pod in served.workloads()["chat"]["pods"]}

    served.write(training__gate={"must_beat": None, "max_bits_per_byte": 9.0})
    served.slipway("local", "up")
    after = {name for name in served.workloads() if name.split("-")[0] in ("data", "train", "promote")}
    assert {name.split("-")[0] for name in after - jobs} == {"promote"}
    assert {pod["name"]: pod["pids"] for pod in served.workloads()["chat"]["pods"]} == replicas

    served.write(training__steps=130)
    served.slipway("local", "up")
    last = {name for name in served.workloads() if name.split("-")[0] in ("data", "train", "promote")}
    assert {name.split("-")[0] for name in last - after} == {"train", "promote"}


def test_down_leaves_no_process_and_no_port(project: Project) -> None:
    project.slipway("local", "up")
    assert project.processes()
    project.slipway("local", "down")
    assert project.processes() == []
    with socket.socket() as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("127.0.0.1", project.port))
    project.slipway("local", "down", "--volumes")
    assert not project.state.exists()
