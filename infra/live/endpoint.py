"""The address of a stack's router on a cluster, for a person at this machine."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from infra.apply import ApiError, Cluster
from infra.live.forward import forwarded
from infra.live.pods import state_of
from infra.live.snapshot import snapshot
from infra.local.objects import entries, section

Json = dict[str, Any]


@contextmanager
def endpoint(cluster: Cluster, *, namespace: str) -> Generator[str]:
    """URL of the router: its load balancer's where it has one, else a forwarded port. Raises `ApiError`."""
    service = cluster.get(f"/api/v1/namespaces/{namespace}/services/router")
    if url := published(service):
        yield url
        return
    pods = [pod for pod in snapshot(cluster, namespace).pods if _is_router(pod) and state_of(pod) == "ready"]
    if not pods:
        raise ApiError("no router is ready. Fix: slipway status says why", status=503)
    port = port_of(pods[0])
    with forwarded(cluster, namespace=namespace, pod=pods[0]["metadata"]["name"], port=port) as url:
        yield url


def published(service: Json) -> str | None:
    """URL of a Service of type LoadBalancer that has an address; None where it has none (yet)."""
    for ingress in entries(section(service, "status", "loadBalancer"), "ingress"):
        if address := ingress.get("hostname") or ingress.get("ip"):
            return f"http://{address}:{service['spec']['ports'][0]['port']}"
    return None


def port_of(pod: Json) -> int:
    """Number of the container port called `http`."""
    ports = [port for container in pod["spec"]["containers"] for port in entries(container, "ports")]
    return next(int(port["containerPort"]) for port in ports if port.get("name") == "http")


def _is_router(pod: Json) -> bool:
    return pod["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "router"
