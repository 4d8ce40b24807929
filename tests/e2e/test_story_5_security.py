"""Story 5: what must stay out stays out."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from infra.apply import ApiError, Cluster
from tests.e2e.pods import CALLER, image_of, may_call, pod

Json = dict[str, Any]
KNOCK = """
import socket, sys
for host, port in (pair.split(":") for pair in sys.argv[1:]):
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
        print("open")
    except OSError as error:
        print("closed")
"""


def knock(
    cluster: Cluster, kubectl: Callable[..., Any], *, name: str, namespace: str, of: str, targets: list[str]
) -> list[str]:
    """Whether each `host:port` can be reached from a pod of `namespace`."""
    command = ["python", "-c", KNOCK, *targets]
    cluster.apply(pod(name, namespace, image_of(cluster, of), command))
    try:
        kubectl("-n", namespace, "wait", f"pod/{name}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=180s")
        return kubectl("-n", namespace, "logs", name).stdout.split()
    finally:
        kubectl("-n", namespace, "delete", "pod", name, "--grace-period=0", "--force")


def pod_ip(cluster: Cluster, namespace: str, component: str) -> str:
    pods = cluster.get(f"/api/v1/namespaces/{namespace}/pods", labelSelector=f"app.kubernetes.io/component={component}")
    return next(pod["status"]["podIP"] for pod in pods["items"] if pod["status"]["phase"] == "Running")


def test_every_pod_runs_as_nobody_on_a_root_that_cannot_be_written(
    settled: Json, kubectl: Callable[..., Any], namespace: str
) -> None:
    code = "import os; print(os.getuid()); open('/here', 'w')"
    done = kubectl("-n", namespace, "exec", "deploy/chat", "--", "python", "-c", code, check=False)
    assert done.stdout.strip() == "65532"
    assert "Read-only file system" in done.stderr


def test_a_pod_as_root_is_refused(settled: Json, cluster: Cluster, namespace: str) -> None:
    rooted = pod("rooted", namespace, image_of(cluster, namespace), ["true"])
    rooted["spec"]["securityContext"] = {"runAsUser": 0}
    with pytest.raises(ApiError, match="violates PodSecurity") as refused:
        cluster.apply(rooted)
    assert refused.value.status == 403


def test_a_stranger_reaches_neither_server_nor_router_nor_metrics(
    settled: Json, cluster: Cluster, kubectl: Callable[..., Any], namespace: str
) -> None:
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "stranger"}})
    server, router = pod_ip(cluster, namespace, "serve"), pod_ip(cluster, namespace, "router")
    targets = [f"{server}:8000", f"{router}:10000", f"{router}:9090"]
    seen = knock(cluster, kubectl, name="stranger", namespace="stranger", of=namespace, targets=targets)
    assert seen == ["closed"] * 3


def test_who_may_call_whom_within_the_stack(
    settled: Json, cluster: Cluster, kubectl: Callable[..., Any], namespace: str
) -> None:
    """Pods of the namespace may call the router by name, and neither the server behind it nor the Kubernetes API."""
    api = "kubernetes.default.svc.cluster.local:443"
    command = ["python", "-c", KNOCK, "router:8080", "chat:8000", api]
    caller = pod("caller", namespace, image_of(cluster, namespace), command, labels=CALLER)
    cluster.apply(may_call(namespace))
    cluster.apply(caller)
    try:
        kubectl("-n", namespace, "wait", "pod/caller", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=180s")
        assert kubectl("-n", namespace, "logs", "caller").stdout.split() == ["open", "closed", "closed"]
    finally:
        kubectl("-n", namespace, "delete", "pod/caller", "networkpolicy/test-caller", "--grace-period=0", "--force")


def test_service_accounts_may_do_nothing(
    settled: Json, cluster: Cluster, kubectl: Callable[..., Any], namespace: str
) -> None:
    accounts = cluster.get(f"/api/v1/namespaces/{namespace}/serviceaccounts")["items"]
    for account in accounts:
        who = f"system:serviceaccount:{namespace}:{account['metadata']['name']}"
        for verb, what in (("list", "secrets"), ("get", "pods"), ("create", "pods"), ("list", "nodes")):
            done = kubectl("-n", namespace, "auth", "can-i", verb, what, f"--as={who}", check=False)
            assert done.stdout.strip() == "no", f"{who} may {verb} {what}"


def test_no_pod_holds_a_token(settled: Json, cluster: Cluster, namespace: str) -> None:
    for one in cluster.get(f"/api/v1/namespaces/{namespace}/pods")["items"]:
        assert "serviceaccount" not in json.dumps(one["spec"].get("volumes", [])).lower().replace(
            "serviceaccountname", ""
        )
