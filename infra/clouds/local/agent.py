"""A process of the node: what a cluster's network and storage add-ons do, done for one node.

The kernel's rules are kept what the network policies say (`policies`), and claims are given volumes (`volumes`).
"""

import sys
import time
from pathlib import Path
from typing import Any

from infra.apply.client import ApiError, Cluster
from infra.clouds.local import volumes
from infra.clouds.local.policies import Pod, ruleset
from infra.clouds.local.shell import run

Json = dict[str, Any]
EVERY_S = 0.5
"""Whole lists, from the API server's cache: for one node's pods that costs less than watching right."""


def main(kubeconfig: Path) -> None:
    """Go on until killed. The rules in force stay while the API server does not answer."""
    cluster, in_force = Cluster(kubeconfig), ""
    while True:
        try:
            wanted = _rules(cluster)
            if wanted != in_force:
                run("nft", "-f", "-", stdin=wanted).check_returncode()
                in_force = wanted
            volumes.provide(cluster)
        except ApiError as error:
            print(f"all stays as it is: {error}", flush=True)
        time.sleep(EVERY_S)


def pod_of(item: Json) -> Pod | None:
    """A pod with a network of its own and an address; None for others."""
    status, spec = item.get("status", {}), item["spec"]
    if spec.get("hostNetwork") or not status.get("podIP") or status.get("phase") in ("Succeeded", "Failed"):
        return None
    containers = [*spec["containers"], *spec.get("initContainers", [])]
    ports = {
        port["name"]: (port.get("protocol", "TCP").lower(), port["containerPort"])
        for container in containers
        for port in container.get("ports", [])
        if "name" in port
    }
    metadata = item["metadata"]
    return Pod(namespace=metadata["namespace"], labels=metadata.get("labels", {}), ip=status["podIP"], ports=ports)


def _rules(cluster: Cluster) -> str:
    items = cluster.get("/api/v1/pods", resourceVersion="0")["items"]
    spaces = cluster.get("/api/v1/namespaces", resourceVersion="0")["items"]
    policies = cluster.get("/apis/networking.k8s.io/v1/networkpolicies", resourceVersion="0")["items"]
    namespaces = {space["metadata"]["name"]: space["metadata"].get("labels", {}) for space in spaces}
    return ruleset([pod for pod in map(pod_of, items) if pod], namespaces, policies)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
