"""Pods of the tests' own, beside the stack's."""

from typing import Any

from infra.apply import Cluster

Json = dict[str, Any]
CALLER = {"test": "caller"}
"""Label of pods that may call out: the stack's own have policies of theirs, and a default of nothing."""


def pod(
    name: str, namespace: str, image: str, command: list[str], *, labels: dict[str, str] | None = None, **spec: Any
) -> Json:
    """A pod that Pod Security `restricted` takes."""
    container = {
        "name": "main",
        "image": image,
        "command": command,
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    security = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
        "spec": {"restartPolicy": "Never", "securityContext": security, "containers": [container], **spec},
    }


def image_of(cluster: Cluster, namespace: str) -> str:
    """The server's image, which has a Python."""
    deployment = cluster.get(f"/apis/apps/v1/namespaces/{namespace}/deployments/chat")
    return deployment["spec"]["template"]["spec"]["containers"][0]["image"]


def may_call(namespace: str) -> Json:
    """The policy that lets pods labelled `CALLER` call every pod of the namespace, as far as those let them."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "test-caller", "namespace": namespace},
        "spec": {
            "podSelector": {"matchLabels": CALLER},
            "policyTypes": ["Egress"],
            "egress": [{"to": [{"podSelector": {}}]}],
        },
    }
