"""Why a pod has no node: the scheduler's sentence, taken apart and said with what would mend it. Pure functions of objects."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

Json = dict[str, Any]
_CLAUSE = re.compile(r"^(?:(\d+) )?(?:node\(s\) )?(.*?)\.?$")
_ABSENT = re.compile(r'persistentvolumeclaim "(.*?)" not found')
_ASIDE = re.compile(r"[,.]? (?:no new claims to deallocate,|preemption:)")
"""What follows says of other pods and of devices whether they could make room."""
_KEEP_OUT = ("NoSchedule", "NoExecute")
_TAINT = re.compile(r"untolerated taint(?:\(s\))? ?\{?([^:}]*)(?::\s*([^}]*))?\}?")


def unschedulable(pod: Json) -> str | None:
    """The scheduler's message, where it found no node."""
    for condition in pod.get("status", {}).get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message") or condition.get("reason") or "not scheduled yet")
    return None


def why_no_node(message: str, pod: Json, nodes: Sequence[Json] = ()) -> list[str]:
    """Each reason in people's words, with the fix; the message itself where it is none that is known.

    `nodes`, where the caller may list them, say which taint it is: since 1.36 the scheduler does not.
    """
    message = _ASIDE.split(message)[0]
    head, _, tail = message.partition(": ")
    if head.startswith("0/0 nodes"):
        return ["the cluster has no node yet: an autoscaler is making one, or the node pools are not there"]
    if "nodes are available" not in head:
        return [_other(message)]
    clauses = tail.split(", ")
    said = [_say(clause, pod, nodes) for clause in clauses if clause.strip()]
    return list(dict.fromkeys(said)) or [_other(message)]


def _say(clause: str, pod: Json, all_nodes: Sequence[Json]) -> str:
    found = _CLAUSE.match(clause.strip())
    count, what = (found[1], found[2]) if found else (None, clause)
    nodes = "" if count is None else f" ({count} node{'' if count == '1' else 's'})"
    if what.startswith("Insufficient "):
        resource = what.removeprefix("Insufficient ")
        return (
            f"no capacity{nodes}: it asks for {_asked(pod, resource)} of {resource}, and no node has as much free; "
            "wait for what runs there, raise the pool's max_nodes, or ask for less"
        )
    if "Too many pods" in what:
        return f"the node's pods are at their most{nodes}; add a node"
    if taint := _TAINT.search(what):
        taints = [(taint[1], taint[2] or "")] if taint[1] else _untolerated(pod, all_nodes)
        named = ", ".join(f"{key}: {value}" if value else key for key, value in taints)
        mended = _mend_taint(taints[0][0] if taints else "")
        return f"taint {named} keeps it out{nodes}; {mended}" if named else f"a taint keeps it out{nodes}; {mended}"
    if "node affinity/selector" in what or "node selector" in what:
        return (
            f"no node has the labels that it looks for, {_selector(pod)}{nodes}; make the node pool, or label the nodes"
        )
    if "volume node affinity conflict" in what:
        return f"its volume lies in another zone or on another node{nodes}; keep the pool in the volume's zone, or storage.shared: true"
    if "unbound immediate PersistentVolumeClaims" in what or "unbound" in what:
        return "its volume is not there yet: see the claims"
    if absent := _ABSENT.search(what):
        return f"there is no volume {absent[1]!r}; make the claim, or mend volume_claim"
    if "anti-affinity" in what:
        return f"another pod of its kind is there already{nodes}; add a node"
    if "unschedulable" in what:
        return f"cordoned{nodes}: a drain is under way; `kubectl uncordon` opens a node again"
    return f"{what}{nodes}"


def _other(message: str) -> str:
    if absent := _ABSENT.search(message):
        return f"there is no volume {absent[1]!r}; make the claim, or mend volume_claim"
    return f"the scheduler says: {message}"


def _mend_taint(key: str) -> str:
    if key.startswith("node.kubernetes.io/"):
        return {
            "node.kubernetes.io/not-ready": "the node is not ready; see `kubectl describe node`",
            "node.kubernetes.io/unreachable": "the node does not answer",
            "node.kubernetes.io/disk-pressure": "the node's disk is full",
            "node.kubernetes.io/memory-pressure": "the node's memory is full",
        }.get(key, "the node's own condition; see `kubectl describe node`")
    return "it belongs to another pool or to someone else"


def _untolerated(pod: Json, nodes: Sequence[Json]) -> list[tuple[str, str]]:
    """(key, value) of each taint for which no pod like this one is put on a node."""
    tolerations = pod["spec"].get("tolerations", [])
    taints = [taint for node in nodes for taint in node["spec"].get("taints", []) if taint["effect"] in _KEEP_OUT]
    kept = [taint for taint in taints if not any(_tolerates(one, taint) for one in tolerations)]
    return list(dict.fromkeys((taint["key"], taint.get("value", "")) for taint in kept))


def _tolerates(toleration: Json, taint: Json) -> bool:
    """https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/"""
    exists = toleration.get("operator") == "Exists"
    return (
        toleration.get("effect", taint["effect"]) == taint["effect"]
        and toleration.get("key", taint["key"] if exists else "") == taint["key"]
        and (exists or toleration.get("value", "") == taint.get("value", ""))
    )


def _asked(pod: Json, resource: str) -> str:
    """What the pod's containers request together; init containers run before and are not added."""
    amounts = [
        amount
        for container in pod["spec"]["containers"]
        if (amount := container.get("resources", {}).get("requests", {}).get(resource))
    ]
    return " + ".join(amounts) or "some"


def _selector(pod: Json) -> str:
    return ", ".join(f"{key}={value}" for key, value in pod["spec"].get("nodeSelector", {}).items()) or "an affinity"


def claims_of(pod: Json) -> Iterator[str]:
    """Names of the PersistentVolumeClaims that a pod mounts."""
    for volume in pod["spec"].get("volumes", []):
        if claim := volume.get("persistentVolumeClaim"):
            yield claim["claimName"]
