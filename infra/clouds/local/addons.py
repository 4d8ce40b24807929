"""What a bare cluster is given: names, volumes, metrics of pods, the kinds of Prometheus' operator, GPUs to schedule; and what it
is asked for (`options`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from infra.apply.client import ApiError, Cluster
from infra.clouds.local import golang
from infra.clouds.local.options import MONITORS, OPTIONS, AddOn, Kinds

Json = dict[str, Any]
GPU = "nvidia.com/gpu"
FOLDER = Path(__file__).parent / "addons"
ALWAYS = ("metrics-server.yaml",)
BARE = ("admins.yaml", "coredns.yaml", "storage.yaml")
"""What kind and clouds bring themselves."""


def define(cluster: Cluster, options: Sequence[AddOn], *, compiler: Path) -> list[Json]:
    """Bring the kinds that come with a cluster of ours and with `options`, which the Go `compiler` has the sources of; they are
    known a moment later."""
    wanted = (MONITORS, *(OPTIONS[name].kinds for name in options))
    documents = [one for kinds in wanted for one in _definitions(kinds, compiler)]
    for document in documents:
        cluster.apply(document)
    return documents


def unknown(cluster: Cluster, definitions: Sequence[Json]) -> list[str]:
    """Kinds among `definitions` that the API server does not serve yet."""
    wanted = {
        (f"/apis/{one['spec']['group']}/{version['name']}", one["spec"]["names"]["kind"])
        for one in definitions
        for version in one["spec"]["versions"]
        if version["served"]
    }
    served = {(path, kind) for path in {path for path, _ in wanted} for kind in _served(cluster, path)}
    return sorted(kind for _, kind in wanted - served)


def install(cluster: Cluster, *, everything: bool, options: Sequence[AddOn]) -> None:
    """Apply the manifests; again changes nothing."""
    names = [*((*BARE, *ALWAYS) if everything else ()), *(f"{name}.yaml" for name in options)]
    for name in names:
        for document in _documents(FOLDER / name):
            cluster.apply(document)


def installed(cluster: Cluster) -> tuple[AddOn, ...]:
    """Options that the cluster has: each has a namespace of its own."""
    spaces = {space["metadata"]["name"] for space in cluster.get("/api/v1/namespaces")["items"]}
    return tuple(name for name in OPTIONS if name in spaces)


def waiting(cluster: Cluster) -> tuple[str, ...]:
    """What of the add-ons is not ready."""
    options = installed(cluster)
    found = [
        f"{deployment['metadata']['name']} is not ready"
        for namespace in ("kube-system", *options)
        for deployment in cluster.get(f"/apis/apps/v1/namespaces/{namespace}/deployments")["items"]
        if deployment.get("status", {}).get("readyReplicas", 0) < deployment["spec"]["replicas"]
    ]
    return (*found, *(_not_ready(cluster) if options else ()))


def _not_ready(cluster: Cluster) -> Iterator[str]:
    """What operators make, and APIs that pods of theirs answer for."""
    for one in cluster.get("/apis/monitoring.coreos.com/v1/namespaces/monitoring/prometheuses")["items"]:
        if one.get("status", {}).get("availableReplicas", 0) < one["spec"]["replicas"]:
            yield f"prometheus {one['metadata']['name']} is not ready"
    for one in cluster.get("/apis/apiregistration.k8s.io/v1/apiservices")["items"]:
        if _condition(one, "Available") == "False":
            yield f"API {one['metadata']['name']} is not answered yet"


def _condition(of: Json, kind: str) -> str | None:
    conditions = of.get("status", {}).get("conditions", [])
    return next((one["status"] for one in conditions if one["type"] == kind), None)


def stand_in_gpus(cluster: Cluster, gpus: int) -> None:
    """Have each node say that it has `gpus` GPUs: they are scheduled as real ones are, and nothing is behind them.

    https://kubernetes.io/docs/tasks/administer-cluster/extended-resource-node/
    """
    for node in cluster.get("/api/v1/nodes")["items"] if gpus else ():
        path = f"/api/v1/nodes/{node['metadata']['name']}/status"
        cluster.patch(path, {"status": {"capacity": {GPU: str(gpus)}}})


def _served(cluster: Cluster, path: str) -> set[str]:
    try:
        return {one["kind"] for one in cluster.get(path)["resources"]}
    except ApiError as error:
        if error.status == 404:
            return set()
        raise


def _definitions(kinds: Kinds, compiler: Path) -> Iterator[Json]:
    """Without the prose that makes them large."""
    folder = golang.module_folder(kinds.module, tool=kinds.tool, compiler=compiler)
    for pattern in kinds.files:
        for path in sorted(folder.glob(pattern)):
            for document in _documents(path):
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
