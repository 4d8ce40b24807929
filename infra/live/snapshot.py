"""The objects of a namespace that tell how a stack is doing, as the API server has them at one moment."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from infra.apply import ApiError, Cluster
from infra.local.objects import section

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Plain objects by kind; what the caller may not list, or the cluster does not have, is empty."""

    pods: list[Json] = field(default_factory=list[Json])
    jobs: list[Json] = field(default_factory=list[Json])
    deployments: list[Json] = field(default_factory=list[Json])
    replica_sets: list[Json] = field(default_factory=list[Json])
    claims: list[Json] = field(default_factory=list[Json])
    autoscalers: list[Json] = field(default_factory=list[Json])
    scaled_objects: list[Json] = field(default_factory=list[Json])
    quotas: list[Json] = field(default_factory=list[Json])
    events: list[Json] = field(default_factory=list[Json])
    nodes: list[Json] = field(default_factory=list[Json])

    def events_of(self, thing: Json) -> Iterator[Json]:
        """What was reported of an object, newest first."""
        uid, name = thing["metadata"].get("uid"), thing["metadata"]["name"]
        about = [
            event
            for event in self.events
            if event["involvedObject"].get("uid") == uid
            or (uid is None and event["involvedObject"].get("name") == name)
        ]
        yield from sorted(about, key=_when, reverse=True)

    def pods_of(self, thing: Json) -> list[Json]:
        """Pods that an object's selector (a Job's, a Deployment's) finds."""
        wanted = section(thing, "spec", "selector", "matchLabels")
        return [pod for pod in self.pods if wanted and wanted.items() <= pod["metadata"].get("labels", {}).items()]

    def replica_sets_of(self, deployment: Json) -> list[Json]:
        uid = deployment["metadata"].get("uid")
        return [
            one
            for one in self.replica_sets
            if any(o.get("uid") == uid for o in one["metadata"].get("ownerReferences", []))
        ]


def snapshot(cluster: Cluster, namespace: str) -> Snapshot:
    """Read them. Raises `ApiError` where the cluster does not answer or there is no such namespace."""
    cluster.get(f"/api/v1/namespaces/{namespace}")

    def several(path: str) -> list[Json]:
        try:
            return cluster.get(path).get("items", [])
        except ApiError as error:
            if error.status in (403, 404):
                return []
            raise

    core, inside = "/api/v1", f"/namespaces/{namespace}"
    return Snapshot(
        pods=several(f"{core}{inside}/pods"),
        jobs=several(f"/apis/batch/v1{inside}/jobs"),
        deployments=several(f"/apis/apps/v1{inside}/deployments"),
        replica_sets=several(f"/apis/apps/v1{inside}/replicasets"),
        claims=several(f"{core}{inside}/persistentvolumeclaims"),
        autoscalers=several(f"/apis/autoscaling/v2{inside}/horizontalpodautoscalers"),
        scaled_objects=several(f"/apis/keda.sh/v1alpha1{inside}/scaledobjects"),
        quotas=several(f"{core}{inside}/resourcequotas"),
        events=several(f"{core}{inside}/events"),
        nodes=several(f"{core}/nodes"),
    )


def _when(event: Json) -> str:
    """ISO-8601 of the newest occurrence, by whichever field its reporter fills."""
    return (
        section(event, "series").get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
        or ""
    )
