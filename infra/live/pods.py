"""How one pod is doing, and why it does not do more, in one sentence. Pure functions of objects."""

from typing import Any, Literal

from infra.live.scheduling import claims_of, unschedulable, why_no_node
from infra.live.snapshot import Snapshot

Json = dict[str, Any]
State = Literal["pending", "starting", "running", "ready", "failing", "done", "leaving"]
EXITS = {
    1: "failed; see its log",
    2: "refused its input: another try would fail the same way; see the last line of its log",
    75: "was interrupted after a checkpoint and starts again",
    137: "was killed (SIGKILL): by the node, or for memory",
    143: "was stopped (SIGTERM)",
}
"""What an exit code of our programs means (docs/contracts.md, Programs)."""
WAITING = {
    "CreateContainerConfigError": "a Secret or a ConfigMap that it names is not there",
    "InvalidImageName": "the image's name is none",
    "ErrImageNeverPull": "the image is not on the node, and may not be pulled; load it, or set images.registry",
    "CreateContainerError": "the container cannot be made",
    "RunContainerError": "the container cannot be started",
}
IMAGE = ("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable")


def state_of(pod: Json) -> State:
    """One word for a pod."""
    status = pod.get("status", {})
    if pod["metadata"].get("deletionTimestamp"):
        return "leaving"
    phase = status.get("phase", "Pending")
    if phase == "Succeeded":
        return "done"
    if phase == "Failed" or any(_why_waiting(one) in ("failing", "image") for one in _containers(pod)):
        return "failing"
    if phase == "Pending":
        return "pending" if unschedulable(pod) or not pod["spec"].get("nodeName") else "starting"
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))
    return "ready" if ready else "running"


def why(pod: Json, seen: Snapshot) -> list[str]:
    """What keeps a pod from doing its work, each with what would mend it; empty where nothing does."""
    if message := unschedulable(pod):
        return [*why_no_node(message, pod, seen.nodes), *_unbound(pod, seen)]
    reasons = [said for one in _containers(pod) if (said := _container(one, pod))]
    if pod.get("status", {}).get("reason") == "Evicted":
        reasons.insert(0, f"evicted: {pod['status'].get('message', 'the node was short of something')}")
    if state_of(pod) == "starting":
        reasons += [_mount(event["message"]) for event in seen.events_of(pod) if event.get("reason") in _MOUNTS][:1]
        reasons = reasons or _pulling(pod, seen)
    return reasons


_MOUNTS = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")


def _pulling(pod: Json, seen: Snapshot) -> list[str]:
    """That an image is on its way, where that is the last that was heard."""
    newest = next(seen.events_of(pod), None)
    return (
        [str(newest["message"]).replace("Pulling", "pulls", 1)] if newest and newest.get("reason") == "Pulling" else []
    )


def _mount(message: str) -> str:
    if "Multi-Attach" in message:
        return (
            "its volume is attached to another node; wait for that pod to go, "
            "or storage.shared: true with a class that gives ReadWriteMany"
        )
    if "secret" in message and "not found" in message:
        return f"a Secret that it mounts is not there: {message}"
    return message


def _unbound(pod: Json, seen: Snapshot) -> list[str]:
    known = {claim["metadata"]["name"]: claim for claim in seen.claims}
    missing = [name for name in claims_of(pod) if name not in known]
    waiting = [name for name in claims_of(pod) if known.get(name, {}).get("status", {}).get("phase") == "Pending"]
    said = [f"there is no volume {name!r}; make the claim, or mend volume_claim" for name in missing]
    return [*said, *(f"volume {name!r} is not bound: {why_unbound(known[name], seen)}" for name in waiting)]


def why_unbound(claim: Json, seen: Snapshot) -> str:
    """Why a claim has no volume."""
    event = next((e for e in seen.events_of(claim) if e.get("reason") not in ("WaitForPodScheduled",)), None)
    reason, message = (event.get("reason"), event.get("message", "")) if event else ("", "")
    if reason == "WaitForFirstConsumer" or not event:
        return "it is made when its first pod has a node"
    if "storageclass" in message and "not found" in message:
        return f"{message}; mend storage.class_name"
    if reason == "FailedBinding" and "no storage class" in message:
        return "the cluster has no default StorageClass; name one as storage.class_name"
    return message


def _containers(pod: Json) -> list[Json]:
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _why_waiting(status: Json) -> str | None:
    reason = status.get("state", {}).get("waiting", {}).get("reason")
    if reason in IMAGE:
        return "image"
    return "failing" if reason == "CrashLoopBackOff" or reason in WAITING else None


def _container(status: Json, pod: Json) -> str | None:
    """What a container says of itself, where it does not run as it should."""
    state, name = status.get("state", {}), status["name"]
    if waiting := state.get("waiting"):
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in IMAGE:
            return f"image {status.get('image') or _image(pod, name)} cannot be pulled: {_pull(message)}"
        if reason == "CrashLoopBackOff":
            ended = status.get("lastState", {}).get("terminated", {})
            return f"{name} fails again and again ({status.get('restartCount', 0)} times): it {_ended(ended)}"
        return f"{name}: {WAITING[reason]}: {message}" if reason in WAITING else None
    if (ended := state.get("terminated")) and ended.get("exitCode"):
        return f"{name} {_ended(ended)}"
    if "running" in state and name == "wait":
        command = next((c["command"] for c in pod["spec"].get("initContainers", []) if c["name"] == name), [""])
        return f"waits for {command[-1]}, which the stage before it writes"
    return None


def _image(pod: Json, container: str) -> str:
    of = [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    return next((c["image"] for c in of if c["name"] == container), "")


def _pull(message: str) -> str:
    lower = message.lower()
    if "unauthorized" in lower or "denied" in lower or "forbidden" in lower or "401" in lower or "403" in lower:
        return "the registry refuses it; name a Secret as images.pull_secret"
    if "not found" in lower or "404" in lower or "does not exist" in lower:
        return "there is no such image; push it, or load it into the cluster (`slipway images build`)"
    if "no such host" in lower or "dial tcp" in lower or "timeout" in lower or "i/o" in lower:
        return "the registry does not answer from the node; load the image into the cluster (`slipway images build`)"
    return message or "the node tries again"


def _ended(terminated: Json) -> str:
    if terminated.get("reason") == "OOMKilled":
        return "was killed for memory (OOMKilled): raise its memory_gib, or lower micro_batch or kv_gib"
    code = terminated.get("exitCode", 1)
    return EXITS.get(code, f"ended with exit code {code}; see its log")
