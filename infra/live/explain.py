"""How a stack is doing, workload by workload: pure functions from the cluster's objects to sentences for people."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from infra.live.pods import state_of, why, why_unbound
from infra.live.scaling import scaling_of
from infra.live.snapshot import Snapshot

Json = dict[str, Any]
_QUOTA = re.compile(r"exceeded quota: (\S+), requested: (.+?), used: (.+?), limited: (.+)$")
FAILED_JOB = {
    "PodFailurePolicy": "refused: a program said that another try would fail the same way",
    "BackoffLimitExceeded": "failed too often; raise training.max_restarts once the cause is mended",
    "FailedIndexes": "one pod of the gang failed too often",
    "MaxFailedIndexesExceeded": "one pod of the gang failed too often",
    "DeadlineExceeded": "took longer than it may",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One workload, volume or quota."""

    what: str
    """`job/train-pylib-…`, `deployment/chat`."""
    state: str
    """`ready`, `rolling`, `waiting`, `failing`, `done`."""
    ready: int
    """Pods that are ready (of a Job: that have ended well)."""
    wanted: int
    says: tuple[str, ...] = ()
    """What it waits for or suffers from, each with what would mend it."""

    def to_json(self) -> Json:
        return asdict(self)


def explain(seen: Snapshot) -> list[Line]:
    """Jobs, Deployments, and what of volumes and quotas is in the way."""
    jobs = sorted(seen.jobs, key=lambda job: job["metadata"].get("creationTimestamp") or "")
    return [
        *(_job(job, seen) for job in jobs),
        *(_deployment(deployment, seen) for deployment in seen.deployments),
        *_claims(seen),
        *_quotas(seen),
    ]


def _job(job: Json, seen: Snapshot) -> Line:
    status, wanted = job.get("status", {}), job["spec"].get("completions", 1)
    state, says = "running", list[str]()
    for condition in status.get("conditions", []):
        if condition["status"] != "True":
            continue
        if condition["type"] == "Complete":
            return Line(what=_name("job", job), state="done", ready=wanted, wanted=wanted)
        if condition["type"] == "Failed":
            state = "failing"
            says = [str(FAILED_JOB.get(condition.get("reason", ""), condition.get("message", "failed")))]
    if job["spec"].get("suspend"):
        says.append("suspended: something else (a queue such as Kueue) decides when it starts")
    pods = seen.pods_of(job)
    says += [*_not_made(job, seen), *_of_pods(pods, seen)]
    if any(_crashes(pod) for pod in pods):
        state = "failing"
    elif state != "failing" and (not pods or any(state_of(pod) in ("pending", "starting") for pod in pods)):
        state = "waiting"
    if failed := status.get("failed"):
        says.append(f"{failed} failed pod{'s' if failed > 1 else ''} so far" + _last_failure(pods, seen))
    return Line(
        what=_name("job", job), state=state, ready=status.get("succeeded", 0), wanted=wanted, says=_unique(says)
    )


def _deployment(deployment: Json, seen: Snapshot) -> Line:
    spec, status = deployment["spec"], deployment.get("status", {})
    wanted, ready = spec.get("replicas", 1), status.get("readyReplicas", 0)
    rolling, standing = _roll_out(deployment)
    says = list(standing)
    pods = seen.pods_of(deployment)
    says += _not_made(deployment, seen)
    for replica_set in seen.replica_sets_of(deployment):
        says += _not_made(replica_set, seen)
    says += [*_of_pods(pods, seen), *_unready(pods), *scaling_of(deployment, seen)]
    if rolling:
        state = rolling
    elif ready >= wanted:
        state = "ready"
    else:
        state = "failing" if any(state_of(pod) == "failing" for pod in pods) else "waiting"
    return Line(what=_name("deployment", deployment), state=state, ready=ready, wanted=wanted, says=_unique(says))


def _roll_out(deployment: Json) -> tuple[str | None, list[str]]:
    """Where a roll-out stands, if one is under way."""
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return "rolling", ["the change has not been taken up yet"]
    new, all_of = status.get("updatedReplicas", 0), status.get("replicas", 0)
    old = all_of - new
    stopped = any(
        c["type"] == "Progressing" and c["status"] == "False" and c.get("reason") == "ProgressDeadlineExceeded"
        for c in status.get("conditions", [])
    )
    ready = status.get("readyReplicas", 0)
    if stopped and (old > 0 or ready < wanted):
        limit = deployment["spec"].get("progressDeadlineSeconds", 600)
        serves = f"{old} of the version before go on serving" if old else "nothing of an earlier version is left"
        return "failing", [f"the roll-out stands still: no new pod got ready within {limit} s; {serves}"]
    if deployment["spec"].get("paused"):
        return "rolling", ["paused"]
    if old > 0 or (new < wanted and all_of):
        return "rolling", [f"roll-out: {new} of {wanted} on the new version, {old} of the version before still there"]
    return None, []


def _not_made(owner: Json, seen: Snapshot) -> list[str]:
    """Pods that the API server refused to make: a quota, or Pod Security."""
    event = next((e for e in seen.events_of(owner) if e.get("reason") == "FailedCreate"), None)
    failure = next(
        (
            c
            for c in owner.get("status", {}).get("conditions", [])
            if c["type"] == "ReplicaFailure" and c["status"] == "True"
        ),
        None,
    )
    # An event outlives its cause: a workload whose pods are there has none.
    lacks = len(seen.pods_of(owner)) < _pods_wanted(owner)
    message = failure["message"] if failure else event["message"] if event and lacks else None
    return [why_forbidden(str(message))] if message else []


def why_forbidden(message: str) -> str:
    """A pod that may not be made, in people's words."""
    if found := _QUOTA.search(message):
        quota, requested, used, limited = found.groups()
        return (
            f"quota {quota!r} keeps it out: it asks for {requested}, {used} is used, {limited} is the limit; "
            "raise tenancy.quota, or end something"
        )
    if "violates PodSecurity" in message:
        return f"Pod Security keeps it out: {message.split('violates PodSecurity', 1)[1].strip()}"
    if "serviceaccount" in message and "not found" in message:
        return "its ServiceAccount is not there; apply the stack again"
    return message


def _of_pods(pods: list[Json], seen: Snapshot) -> list[str]:
    """What pods that do not run say, once for each thing that is said; the newest of a Job's failures only."""
    alive = [pod for pod in pods if state_of(pod) not in ("done", "leaving")]
    running = [pod for pod in alive if state_of(pod) != "failing"]
    said = Counter(reason for pod in (running or alive[-1:]) for reason in why(pod, seen))
    if running:
        said.update(reason for pod in alive if _crashes(pod) for reason in why(pod, seen))
    return [f"{reason} ({count} pods)" if count > 1 else reason for reason, count in said.items()]


def _last_failure(pods: list[Json], seen: Snapshot) -> str:
    """`, the last: …` where a failed pod is still there to say why."""
    failed = [pod for pod in pods if pod.get("status", {}).get("phase") == "Failed"]
    newest = max(failed, key=lambda pod: pod["metadata"].get("creationTimestamp") or "", default=None)
    reasons = why(newest, seen) if newest else []
    return f", the last: {reasons[0]}" if reasons else ""


def _crashes(pod: Json) -> bool:
    return state_of(pod) == "failing" and pod.get("status", {}).get("phase") != "Failed"


def _unready(pods: list[Json]) -> list[str]:
    """Servers that run and may not be asked yet."""
    waiting = [
        pod
        for pod in pods
        if state_of(pod) == "running" and pod["metadata"].get("labels", {}).get(COMPONENT) == "serve"
    ]
    if not waiting:
        return []
    return [f"{len(waiting)} running and not ready: loading, or waiting until the channel has a model"]


COMPONENT = "app.kubernetes.io/component"


def _claims(seen: Snapshot) -> Iterator[Line]:
    for claim in seen.claims:
        phase = claim.get("status", {}).get("phase")
        if phase not in ("Bound", None):
            says = "its volume is gone" if phase == "Lost" else why_unbound(claim, seen)
            state = "failing" if phase == "Lost" else "waiting"
            yield Line(what=_name("volume", claim), state=state, ready=0, wanted=1, says=(says,))


def _quotas(seen: Snapshot) -> Iterator[Line]:
    """Quotas that are used up: what comes next will not be made."""
    for quota in seen.quotas:
        status = quota.get("status", {})
        hard, used = status.get("hard", {}), status.get("used", {})
        full = [name for name, most in hard.items() if used.get(name) == most and most != "0"]
        if full:
            says = tuple(f"{name}: all of {hard[name]} used" for name in full)
            yield Line(what=_name("quota", quota), state="full", ready=0, wanted=0, says=says)


def _pods_wanted(owner: Json) -> int:
    return owner["spec"].get("parallelism") or owner["spec"].get("replicas") or 1


def _name(kind: str, thing: Json) -> str:
    return f"{kind}/{thing['metadata']['name']}"


def _unique(says: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(says))
