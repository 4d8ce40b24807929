"""An Envoy bootstrap that was rendered for a cluster, made to run on one machine.

In a cluster Envoy follows a Service by DNS, and sees the pods that are ready now. Here every endpoint that names a
Service is moved to a file of endpoints (EDS, https://www.envoyproxy.io/docs/envoy/latest/configuration/upstream/
cluster_manager/cds, `path_config_source`), which holds the pods that are ready now: Envoy reloads it when it is replaced.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from infra.local.addresses import LOOPBACK
from infra.local.objects import Json, digest, entries, section

_LOCAL = frozenset({"0.0.0.0", "127.0.0.1", "localhost", "::", "::1"})  # noqa: S104
_DNS_KEYS = ("cluster_type", "dns_lookup_family", "dns_refresh_rate", "dns_failure_refresh_rate", "respect_dns_ttl")


@dataclass(frozen=True)
class EndpointFile:
    """The endpoints of one Envoy cluster: the rendered `load_assignment`, and where its present meaning is written."""

    path: Path
    assignment: Json

    def render(self, addresses: Callable[[str, int], list[int] | None]) -> str:
        """The file's text. `addresses(host, port)`: ports of 127.0.0.1 behind the name; None when it names no Service."""
        groups: list[Json] = []
        for group in entries(self.assignment, "endpoints"):
            endpoints: list[Json] = []
            for lb_endpoint in entries(group, "lb_endpoints"):
                address = _socket_address(lb_endpoint)
                ports = addresses(address["address"], address["port_value"]) if address else None
                endpoints += [lb_endpoint] if ports is None else [_at(lb_endpoint, port) for port in ports]
            groups.append(group | {"lb_endpoints": endpoints})
        resource = self.assignment | {
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "endpoints": groups,
        }
        return json.dumps({"version_info": digest(resource)[:12], "resources": [resource]}, indent=1)


def parse(text: str) -> Json | None:
    """`text` as an Envoy bootstrap, or None when it is something else."""
    if "static_resources" not in text:
        return None
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return cast("Json", config) if isinstance(config, dict) and "static_resources" in config else None


def rewrite(
    config: Json,
    *,
    names_service: Callable[[str, int], bool],
    own_ports: dict[int, int],
    rewrite_text: Callable[[str], str],
    directory: Path,
) -> tuple[Json, list[EndpointFile]]:
    """The bootstrap for this machine, and the endpoint files that it reads from `directory`.

    `own_ports` maps the container ports of Envoy's own pod; `rewrite_text` is applied to every string.
    """
    # Text first: the paths that are put in below are of this machine, and may lie under a mountPath of Envoy's.
    config = _walk(config, own_ports, rewrite_text)
    files: list[EndpointFile] = []
    clusters: list[Json] = []
    for cluster in entries(config["static_resources"], "clusters"):
        assignment = section(cluster, "load_assignment")
        lb_endpoints = [e for group in entries(assignment, "endpoints") for e in entries(group, "lb_endpoints")]
        addresses = [a for a in map(_socket_address, lb_endpoints) if a]
        if not any(names_service(a["address"], a["port_value"]) for a in addresses):
            clusters.append(cluster)
            continue
        file = EndpointFile(directory / f"{cluster['name']}.json", assignment | {"cluster_name": cluster["name"]})
        files.append(file)
        kept = {k: v for k, v in cluster.items() if k not in ("load_assignment", *_DNS_KEYS)}
        source = {"path_config_source": {"path": str(file.path)}, "resource_api_version": "V3"}
        clusters.append(kept | {"type": "EDS", "eds_cluster_config": {"eds_config": source}})
    rewritten = config | {"static_resources": config["static_resources"] | {"clusters": clusters}}
    # Envoy refuses dynamic resources, such as endpoint files, without a name for itself.
    rewritten["node"] = {"id": "local", "cluster": "local"} | section(config, "node")
    return rewritten, files


def arguments(argv: list[str]) -> list[str]:
    """Envoys of two stacks would meet in one shared-memory region, which containers keep apart: it is not used here."""
    apart = ("--disable-hot-restart", "--use-dynamic-base-id", "--base-id")
    return argv if any(word.startswith(apart) for word in argv) else [*argv, "--disable-hot-restart"]


def _socket_address(lb_endpoint: Json) -> Json | None:
    return section(lb_endpoint, "endpoint", "address", "socket_address") or None


def _at(lb_endpoint: Json, port: int) -> Json:
    address = {"socket_address": {"address": LOOPBACK, "port_value": port}}
    return lb_endpoint | {"endpoint": lb_endpoint["endpoint"] | {"address": address}}


def _walk(value: Any, own_ports: dict[int, int], rewrite_text: Callable[[str], str]) -> Any:
    """Rewrite each string, and each `socket_address` of this pod's own."""
    if isinstance(value, str):
        return rewrite_text(value)
    if isinstance(value, list):
        return [_walk(v, own_ports, rewrite_text) for v in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    walked: Json = {k: _walk(v, own_ports, rewrite_text) for k, v in cast("Json", value).items()}
    socket_address = walked.get("socket_address")
    if isinstance(socket_address, dict) and cast("Json", socket_address).get("address") in _LOCAL:
        own = cast("Json", socket_address)
        own["address"] = LOOPBACK
        own["port_value"] = own_ports.get(own.get("port_value", 0), own.get("port_value", 0))
    return walked
