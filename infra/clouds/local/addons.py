"""What a bare cluster is given: names, volumes, metrics of pods, the kinds of Prometheus' operator, GPUs to schedule."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from infra.apply.client import Cluster
from infra.clouds.local import golang

Json = dict[str, Any]
GPU = "nvidia.com/gpu"
FOLDER = Path(__file__).parent / "addons"
ALWAYS = ("metrics-server.yaml",)
BARE = ("admins.yaml", "coredns.yaml", "storage.yaml")
"""What kind and clouds bring themselves."""
CRDS = "example/prometheus-operator-crd"
KINDS = ("podmonitors", "servicemonitors", "prometheusrules")


def install(cluster: Cluster, *, everything: bool, monitoring: bool) -> None:
    """Apply the manifests; again changes nothing. A cluster of the user's own is left as it is."""
    names = (*BARE, *ALWAYS) if everything else ()
    for name in names:
        for document in _documents(FOLDER / name):
            cluster.apply(document)
    if monitoring:
        for document in _crds():
            cluster.apply(document)


def waiting(cluster: Cluster) -> tuple[str, ...]:
    """Deployments of the add-ons that are not ready."""
    found: list[str] = []
    for deployment in cluster.get("/apis/apps/v1/namespaces/kube-system/deployments")["items"]:
        if deployment.get("status", {}).get("readyReplicas", 0) < deployment["spec"]["replicas"]:
            found.append(f"{deployment['metadata']['name']} is not ready")
    return tuple(found)


def stand_in_gpus(cluster: Cluster, gpus: int) -> None:
    """Have each node say that it has `gpus` GPUs: they are scheduled as real ones are, and nothing is behind them.

    https://kubernetes.io/docs/tasks/administer-cluster/extended-resource-node/
    """
    for node in cluster.get("/api/v1/nodes")["items"] if gpus else ():
        path = f"/api/v1/nodes/{node['metadata']['name']}/status"
        cluster.patch(path, {"status": {"capacity": {GPU: str(gpus)}}})


def _crds() -> Iterator[Json]:
    """Of Prometheus' operator, from its Go module, without the prose that makes them large."""
    folder = golang.module_folder(golang.MONITORING) / CRDS
    for kind in KINDS:
        for document in _documents(folder / f"monitoring.coreos.com_{kind}.yaml"):
            yield cast(Json, _terse(document))


def _terse(value: Any) -> Any:
    """Without descriptions, which are texts; a property may well be called so."""
    if isinstance(value, dict):
        inner = cast(Json, value).items()
        return {key: _terse(v) for key, v in inner if key != "description" or not isinstance(v, str)}
    return [_terse(v) for v in cast("list[Any]", value)] if isinstance(value, list) else value


def _documents(path: Path) -> Iterator[Json]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    yield from (document for document in yaml.load_all(path.read_text(), loader) if document)
