"""Story 1: from nothing to an answer, by one command (`bringing` says which); and again without a change."""

import json
from pathlib import Path
from typing import Any

from openai import OpenAI

from infra.apply import Cluster
from tests.e2e.conftest import Tell, bring, slipway

Json = dict[str, Any]


def test_jobs_are_complete_and_the_server_is_ready(settled: Json, cluster: Cluster, namespace: str) -> None:
    jobs = cluster.get(f"/apis/batch/v1/namespaces/{namespace}/jobs")["items"]
    complete = {job["metadata"]["labels"]["app.kubernetes.io/component"]: job["status"]["succeeded"] for job in jobs}
    assert complete == {"data": 1, "train": 2, "promote": 1}
    chat = cluster.get(f"/apis/apps/v1/namespaces/{namespace}/deployments/chat")
    assert chat["status"]["readyReplicas"] >= 1


def test_the_ranks_met_over_the_network_of_pods(settled: Json, cluster: Cluster, namespace: str) -> None:
    pods = cluster.get(f"/api/v1/namespaces/{namespace}/pods", labelSelector="app.kubernetes.io/component=train")[
        "items"
    ]
    addresses = {pod["status"]["podIP"] for pod in pods if pod["status"]["phase"] == "Succeeded"}
    assert len(addresses) == 2


def test_the_openai_client_streams_through_the_router(endpoint: str) -> None:
    client = OpenAI(base_url=f"{endpoint}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["pylib"]
    stream = client.completions.create(model="pylib", prompt="def read(", max_tokens=16, temperature=0, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) > 1
    assert "".join(pieces)


def test_a_person_is_told_how_it_is_and_gets_an_answer(settled: Json, kubeconfig: Path, project: Path) -> None:
    of = {"cwd": project, "kubeconfig": kubeconfig}
    status = json.loads(slipway("status", "-s", "dev", "--json", **of).stdout)
    assert {workload["state"] for workload in status["workloads"]} <= {"ready", "done"}
    assert (status["drift"], status["unsettled"]) == ([], None)
    lines = slipway("logs", "train", "-s", "dev", **of).stdout.splitlines()
    assert sum('"event": "done"' in line for line in lines) >= 1
    assert slipway("chat", "def read(", "-s", "dev", "--max-tokens", "8", "--temperature", "0", **of).stdout.strip()


def test_a_second_time_changes_nothing(
    settled: Json, kubeconfig: Path, project: Path, cluster: Cluster, namespace: str, tell: Tell
) -> None:
    def restarts() -> dict[str, int]:
        pods = cluster.get(f"/api/v1/namespaces/{namespace}/pods")["items"]
        return {
            pod["metadata"]["uid"]: sum(one["restartCount"] for one in pod["status"].get("containerStatuses", []))
            for pod in pods
        }

    before = restarts()
    assert bring(project, kubeconfig, tell=tell) == {"created": 0, "changed": 0, "removed": 0}
    assert restarts() == before
