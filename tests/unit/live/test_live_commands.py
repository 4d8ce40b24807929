"""`slipway status` and `logs` with their real client, against recorded answers of an API server over HTTP."""

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from infra.render import run

from . import live_objects as k8s

ROOT = Path(__file__).parents[3]
NAMESPACE = "slipway-dev"
Json = dict[str, Any]
PLURALS = {"NetworkPolicy": "networkpolicies"}


LISTED = {
    "pods",
    "jobs",
    "deployments",
    "replicasets",
    "persistentvolumeclaims",
    "resourcequotas",
    "events",
    "nodes",
    "horizontalpodautoscalers",
}
"""Collections that are asked for besides those of the stack's kinds; any other path is an object's."""


class Recorded:
    """Objects by path, and what is asked of them. A dry run answers with what it was sent, as if all else stood so already."""

    def __init__(self, manifests: tuple[Json, ...]) -> None:
        self.objects: dict[str, Json] = {}
        self.kinds: dict[str, dict[str, Json]] = {}
        self.listed, self.logs = set(LISTED), dict[str, str]()
        self.forbidden: set[str] = set()
        for manifest in manifests:
            self.add(copy.deepcopy(manifest))

    def add(self, manifest: Json) -> str:
        version, kind = manifest["apiVersion"], manifest["kind"]
        namespace = manifest["metadata"].get("namespace")
        plural = PLURALS.get(kind, f"{kind.lower()}s")
        self.listed.add(plural)
        self.kinds.setdefault(version, {})[kind] = {"name": plural, "kind": kind, "namespaced": namespace is not None}
        path = (
            f"{root(version)}{f'/namespaces/{namespace}' if namespace else ''}/{plural}/{manifest['metadata']['name']}"
        )
        self.objects[path] = manifest
        return path

    def answer(self, method: str, path: str, body: Json | None) -> tuple[int, Json | str]:
        if path in self.forbidden:
            return 403, {"message": f"{path} is forbidden", "reason": "Forbidden"}
        if method == "PATCH":
            return 200, body or {}
        if path in self.objects:
            return 200, self.objects[path]
        if path in self.logs:
            return 200, self.logs[path]
        for version, kinds in self.kinds.items():
            if path == root(version):
                return 200, {"resources": list(kinds.values())}
        if path.rpartition("/")[2] in self.listed:
            return 200, {"items": [one for where, one in self.objects.items() if where.rpartition("/")[0] == path]}
        return 404, {"message": "not found", "reason": "NotFound"}


def root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


@pytest.fixture(scope="module")
def declared() -> tuple[Json, ...]:
    return run(ROOT / "stacks" / "Pulumi.dev.yaml").manifests


@pytest.fixture
def cluster(declared: tuple[Json, ...], tmp_path: Path) -> Iterator[tuple[Recorded, Path]]:
    recorded = Recorded(declared)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_PATCH(self) -> None:
            assert parse_qs(urlsplit(self.path).query)["dryRun"] == ["All"]  # nothing may be changed by looking
            self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _answer(self, body: Json | None) -> None:
            status, document = recorded.answer(self.command, urlsplit(self.path).path, body)
            data = (document if isinstance(document, str) else json.dumps(document)).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(yaml.safe_dump(config_of(f"http://127.0.0.1:{server.server_port}")))
        yield recorded, kubeconfig
        server.shutdown()


def config_of(url: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": url}}],
        "users": [{"name": "x", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    }


@pytest.fixture
def slipway(cluster: tuple[Recorded, Path]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "infra.cli.main", *words, "-s", "dev", "--kubeconfig", str(cluster[1])]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    return call


def in_namespace(thing: Json, version: str, kind: str) -> Json:
    metadata = thing["metadata"] | {"namespace": NAMESPACE}
    return thing | {"apiVersion": version, "kind": kind, "metadata": metadata}


def test_status_says_what_waits_why_and_what_differs(cluster: tuple[Recorded, Path], slipway: Any) -> None:
    recorded, _ = cluster
    (path,) = [where for where in recorded.objects if where.endswith("/deployments/chat")]
    labels = recorded.objects[path]["spec"]["template"]["metadata"]["labels"]
    recorded.objects[path]["spec"]["progressDeadlineSeconds"] = 77  # by hand
    pod = k8s.unscheduled("0/3 nodes are available: 3 Insufficient cpu.", labels=labels)
    recorded.add(in_namespace(pod, "v1", "Pod"))
    trainer = in_namespace(k8s.running("train-0", labels=k8s.GANG), "v1", "Pod")
    recorded.logs[f"{recorded.add(trainer)}/log"] = (
        '{"event": "progress", "stage": "train", "step": 7, "total": 200, "loss": 2.5, "tokens_per_s": 900}\n'
    )
    recorded.forbidden.add("/api/v1/nodes")  # a developer may not list them
    done = slipway("status", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    chat = next(line for line in found["workloads"] if line["what"] == "deployment/chat")
    assert (chat["state"], chat["ready"]) == ("waiting", 0)
    assert any("no capacity (3 nodes)" in said for said in chat["says"])
    assert (found["training"]["step"], found["training"]["steps"]) == (7, 200)
    of_chat = [difference["says"] for difference in found["drift"] if difference["what"] == "deployment/chat"]
    assert of_chat[0].startswith("spec.progressDeadlineSeconds: 77, declared ")
    undeclared = [difference["what"] for difference in found["drift"] if "not declared" in difference["says"]]
    assert undeclared == []


def test_status_fails_where_the_stack_does(cluster: tuple[Recorded, Path], slipway: Any) -> None:
    recorded, _ = cluster
    (path,) = [where for where in recorded.objects if "/jobs/train-" in where]
    recorded.objects[path]["status"] = {
        "failed": 1,
        "conditions": [{"type": "Failed", "status": "True", "reason": "PodFailurePolicy"}],
    }
    done = slipway("status", "--no-drift")
    assert done.returncode == 1
    assert "another try would fail the same way" in done.stderr


def test_status_waits_no_longer_than_it_can_be_settled_and_says_how_it_is(
    cluster: tuple[Recorded, Path], slipway: Any
) -> None:
    recorded, _ = cluster
    for path, live in recorded.objects.items():
        live["metadata"]["generation"] = 1
        if "/jobs/train-" in path:
            live["status"] = {"conditions": [{"type": "Failed", "status": "True", "message": "exit code 2"}]}
    done = slipway("status", "--no-drift", "--wait", "60", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["unsettled"].endswith("failed: exit code 2")
    assert next(line["state"] for line in found["workloads"] if line["what"].startswith("job/train-")) == "failing"


def test_a_stack_that_is_not_there_is_one_line(cluster: tuple[Recorded, Path], slipway: Any) -> None:
    recorded, _ = cluster
    recorded.objects.clear()
    done = slipway("status")
    assert done.returncode == 1
    assert "dev is not on this cluster" in done.stderr
    assert "Traceback" not in done.stderr


def test_logs_are_those_of_the_component(cluster: tuple[Recorded, Path], slipway: Any) -> None:
    recorded, _ = cluster
    for name, labels in (("chat-0", k8s.LABELS), ("train-0", k8s.GANG)):
        where = recorded.add(in_namespace(k8s.running(name, labels=labels), "v1", "Pod"))
        recorded.logs[f"{where}/log"] = f"{name} one\n{name} two\n"
    assert slipway("logs", "train").stdout == "train-0 serve train-0 one\ntrain-0 serve train-0 two\n"
    assert slipway("logs", "chat", "-f").stdout == "chat-0 serve chat-0 one\nchat-0 serve chat-0 two\n"
    refused = slipway("logs", "trian")
    assert refused.returncode == 2
    assert "there is serve, train" in refused.stderr
