"""Wait until a stack's Jobs are complete and its Deployments ready, saying what is waited for; fail as soon as it cannot be."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from infra.apply.client import ApiError, Cluster

Json = dict[str, Any]
EVERY_S = 1.0


class Unsettled(Exception):
    """The stack failed, or was not settled in time."""


@dataclass(frozen=True)
class Standing:
    done: bool
    what: str
    failed: bool = False


def settle(cluster: Cluster, manifests: Sequence[Json], *, within_s: float, say: Callable[[str], None]) -> None:
    """Return when all of `manifests` that run are as they should be. Raises `Unsettled`, `ApiError` where the API server refuses.

    One that does not answer for a while, as while it is upgraded, is asked again.
    """
    running = [m for m in manifests if m["kind"] in ("Job", "Deployment")]
    until = time.monotonic() + within_s
    told = ""
    while True:
        standings = _standings(cluster, running)
        if failed := [standing.what for standing in standings if standing.failed]:
            raise Unsettled("; ".join(failed))
        waiting = [standing.what for standing in standings if not standing.done]
        if not waiting:
            return
        if (text := " · ".join(waiting)) != told:
            told = text
            say(f"waiting for {text}")
        if time.monotonic() > until:
            raise Unsettled(f"not settled within {within_s:.0f} s: {text}")
        time.sleep(EVERY_S)


def _standings(cluster: Cluster, running: Sequence[Json]) -> list[Standing]:
    try:
        return [_standing(cluster.find(manifest), manifest) for manifest in running]
    except ApiError as error:
        if error.status:
            raise
        return [Standing(False, str(error))]


def _standing(live: Json | None, manifest: Json) -> Standing:
    name = f"{manifest['kind'].lower()}/{manifest['metadata']['name']}"
    if live is None:
        return Standing(False, f"{name} (gone)", failed=True)
    status = live.get("status", {})
    return _job(name, live, status) if manifest["kind"] == "Job" else _deployment(name, live, status)


def _job(name: str, live: Json, status: Json) -> Standing:
    for condition in status.get("conditions", []):
        if condition["type"] == "Failed" and condition["status"] == "True":
            return Standing(False, f"{name} failed: {condition.get('message', '')}", failed=True)
        if condition["type"] == "Complete" and condition["status"] == "True":
            return Standing(True, name)
    wanted = live["spec"].get("completions", 1)
    return Standing(False, f"{name} ({status.get('succeeded', 0)}/{wanted}, {status.get('ready', 0)} running)")


def _deployment(name: str, live: Json, status: Json) -> Standing:
    """As `kubectl rollout status` has it: seen, all replicas of the new kind, none of the old, all available."""
    wanted, updated = live["spec"].get("replicas", 1), status.get("updatedReplicas", 0)
    for condition in status.get("conditions", []):
        if condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            return Standing(False, f"{name} makes no progress: {condition.get('message', '')}", failed=True)
    seen = status.get("observedGeneration", 0) >= live["metadata"]["generation"]
    available = status.get("availableReplicas", 0)
    done = seen and updated == wanted and status.get("replicas", 0) == wanted and available >= wanted
    return Standing(done, f"{name} ({min(available, updated)}/{wanted} ready)")
