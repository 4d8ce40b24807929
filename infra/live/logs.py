"""Log lines of a stack's pods on a cluster, one pod after the other, or as they come."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infra.apply import ApiError, Cluster
from infra.live.snapshot import Snapshot

Json = dict[str, Any]


@dataclass(frozen=True)
class LogLine:
    pod: str
    container: str
    text: str


def chosen(seen: Snapshot, name: str | None) -> list[Json]:
    """Pods of a component (`train`), a service (`chat`), a workload or by their own name; all of the stack's without one.

    Raises ValueError that names what there is.
    """
    ours = [pod for pod in seen.pods if pod["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") == "slipway"]
    if name is None:
        return ours
    found = [pod for pod in ours if name in _names(pod)]
    if not found:
        known = sorted({pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in ours})
        there = f"there is {', '.join(known)}" if known else "the stack has no pods"
        raise ValueError(f"no pods of {name!r}; {there}. Fix: name a component, a service, a workload or a pod")
    return found


def lines_of(cluster: Cluster, pods: list[Json], *, follow: bool, tail: int) -> Iterator[LogLine]:
    """The last `tail` lines of every container that has begun; with `follow` then what comes, until all have ended."""
    streams = [(pod, container) for pod in pods for container in _begun(pod)]
    if not follow:
        for pod, container in streams:
            yield from _read(cluster, pod, container, tail=tail, follow=False)
        return
    lines: queue.Queue[LogLine | None] = queue.Queue()

    def pump(pod: Json, container: str) -> None:
        try:
            for line in _read(cluster, pod, container, tail=tail, follow=True):
                lines.put(line)
        finally:
            lines.put(None)

    for pod, container in streams:
        threading.Thread(target=pump, args=(pod, container), daemon=True).start()
    ended = 0
    while ended < len(streams):
        line = lines.get()
        if line is None:
            ended += 1
        else:
            yield line


def _read(cluster: Cluster, pod: Json, container: str, *, tail: int, follow: bool) -> Iterator[LogLine]:
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    query = {"container": container, "tailLines": str(tail)} | ({"follow": "true"} if follow else {})
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/log"
    try:
        for line in cluster.lines(path, **query) if follow else cluster.text(path, **query).splitlines():
            yield LogLine(name, container, line)
    except ApiError as error:
        if error.status != 400:  # the container has not begun, or its log is gone with the node
            raise


def _names(pod: Json) -> set[str]:
    labels, name = pod["metadata"].get("labels", {}), pod["metadata"]["name"]
    instance = labels.get("app.kubernetes.io/instance", "")
    return {name, instance, labels.get("app.kubernetes.io/component", "")} - {""}


def _begun(pod: Json) -> Iterator[str]:
    """Containers that run or have run, in the order in which they do."""
    status = pod.get("status", {})
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        if "waiting" not in container.get("state", {}) or container.get("restartCount"):
            yield container["name"]
