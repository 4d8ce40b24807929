"""The pack as the Pulumi engine meets it: a process that serves the analyzer's gRPC interface."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from pulumi.runtime.proto import analyzer_pb2, analyzer_pb2_grpc

from infra.render import run

ROOT = Path(__file__).parents[3]
PACK = ROOT / "infra" / "policy"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def analyzer() -> Iterator[analyzer_pb2_grpc.AnalyzerStub]:
    """The pack, started as the engine starts it, from another folder than the checkout's."""
    command = [sys.executable, "-u", str(PACK), "127.0.0.1:0", str(PACK)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/", env=environment) as process:
        try:
            assert process.stdout
            port = int(process.stdout.readline())
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield analyzer_pb2_grpc.AnalyzerStub(channel)
        finally:
            process.kill()


def resource(manifest: Json, *, token: str = "kubernetes:apps/v1:Deployment") -> Json:
    properties = Struct()
    properties.update(manifest)
    name = manifest["metadata"]["name"]
    urn = f"urn:pulumi:dev::app::{token}::{manifest['kind'].lower()}-{name}"
    return {"type": token, "properties": properties, "urn": urn, "name": name}


def analyze(analyzer: analyzer_pb2_grpc.AnalyzerStub, manifest: Json) -> dict[str, Any]:
    answer = analyzer.Analyze(analyzer_pb2.AnalyzeRequest(**resource(manifest)))
    return {diagnostic.policyName: diagnostic for diagnostic in answer.diagnostics}


def deployment(**container: Any) -> Json:
    whole = {"name": "server", "image": "acme/server:1", "securityContext": {"runAsNonRoot": True}} | container
    template = {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [whole]}}
    spec = {"selector": {"matchLabels": {"app": "x"}}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": spec}


def test_an_error_is_mandatory_and_a_warning_advisory(analyzer: analyzer_pb2_grpc.AnalyzerStub) -> None:
    found = analyze(analyzer, deployment(image="acme/server", resources={"requests": {"nvidia.com/gpu": 1}}))
    assert found.keys() == {"SLW111", "SLW311", "SLW514", "SLW602"}
    assert found["SLW111"].enforcementLevel == analyzer_pb2.MANDATORY
    assert found["SLW602"].enforcementLevel == analyzer_pb2.ADVISORY
    assert "Fix: limits: {nvidia.com/gpu: 1" in found["SLW111"].message


def test_what_is_not_known_at_preview_is_not_guessed(analyzer: analyzer_pb2_grpc.AnalyzerStub) -> None:
    unknown_text, unknown_number = "04da6b54-80e4-46f7-96ec-b56ff0331ba9", "3eeb2bf0-c639-47a8-9e75-3b44932eb421"
    found = analyze(
        analyzer,
        deployment(
            image=unknown_text,
            resources={"requests": {"nvidia.com/gpu": 1}, "limits": {"nvidia.com/gpu": unknown_number}},
        ),
    )
    assert all("can't run policy" in diagnostic.message for code, diagnostic in found.items() if code != "SLW611")
    assert all(diagnostic.enforcementLevel == analyzer_pb2.ADVISORY for diagnostic in found.values())


def test_resources_are_looked_at_together(analyzer: analyzer_pb2_grpc.AnalyzerStub) -> None:
    written = deployment()
    written["spec"]["replicas"] = 3
    target = {"kind": "Deployment", "name": "x", "apiVersion": "apps/v1"}
    scaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "x"},
        "spec": {"scaleTargetRef": target, "maxReplicas": 5},
    }
    both = [
        analyzer_pb2.AnalyzerResource(**resource(written)),
        analyzer_pb2.AnalyzerResource(**resource(scaler, token="kubernetes:autoscaling/v2:HorizontalPodAutoscaler")),
    ]
    (found,) = analyzer.AnalyzeStack(analyzer_pb2.AnalyzeStackRequest(resources=both)).diagnostics
    assert found.policyName == "SLW411"
    assert found.urn.endswith("deployment-x")


def test_what_slipway_declares_passes_its_own_pack(analyzer: analyzer_pb2_grpc.AnalyzerStub) -> None:
    for manifest in run(ROOT / "stacks" / "Pulumi.prod.yaml").manifests:
        assert analyze(analyzer, manifest) == {}, manifest["metadata"]["name"]


def test_the_pack_says_what_each_policy_is(analyzer: analyzer_pb2_grpc.AnalyzerStub) -> None:
    from google.protobuf.empty_pb2 import Empty

    info = analyzer.GetAnalyzerInfo(Empty())
    assert info.name == "slipway"
    names = [policy.name for policy in info.policies]
    assert len(names) == len(set(names)) > 10
    assert all(policy.description for policy in info.policies)
