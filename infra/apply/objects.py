"""Apply a stack's objects and remove what it no longer declares; destroy it.

The cluster keeps the list of the stack's objects, in a ConfigMap beside them. It is written before anything is made (the old
names and the new) and after everything is (the new alone): whenever an apply is cut off, nothing is left that nobody knows of.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.apply.client import ApiError, Cluster

Json = dict[str, Any]
Key = tuple[str, str, str, str]
"""apiVersion, kind, namespace, name."""
# What must be there before what lives in it.
FIRST = ("Namespace", "EC2NodeClass", "NodePool", "ServiceAccount", "ResourceQuota", "LimitRange", "NetworkPolicy")
KEPT = ("Namespace", "PersistentVolumeClaim")
"""Kinds whose loss is a loss of work: `destroy` leaves them unless told otherwise."""
REPLACE = "argocd.argoproj.io/sync-options"
GONE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Applied:
    created: list[Key] = field(default_factory=list[Key])
    changed: list[Key] = field(default_factory=list[Key])
    unchanged: list[Key] = field(default_factory=list[Key])
    removed: list[Key] = field(default_factory=list[Key])


def apply(cluster: Cluster, manifests: Sequence[Json], *, stack: str) -> Applied:
    """Bring `manifests` to the cluster. Raises `ValueError` before anything is made, `ApiError` where it cannot be."""
    _refuse_unknown_kinds(cluster, manifests)
    namespace = next(m["metadata"]["name"] for m in manifests if m["kind"] == "Namespace")
    before = _inventory(cluster, stack, namespace)
    now = [key_of(manifest) for manifest in manifests]
    done = Applied()
    ordered = sorted(manifests, key=lambda m: FIRST.index(m["kind"]) if m["kind"] in FIRST else len(FIRST))
    for manifest in ordered:
        _apply_one(cluster, manifest, done)
        if manifest["kind"] == "Namespace":
            _remember(cluster, stack, namespace, [*before, *now])
    for key in before:
        if key not in now and cluster.delete(reference(key)):
            done.removed.append(key)
    _remember(cluster, stack, namespace, now)
    return done


def destroy(cluster: Cluster, *, stack: str, namespace: str, volumes: bool) -> list[Key]:
    """Remove the stack's objects, and its volumes and namespace only if `volumes`. What it removed."""
    inventory = _inventory(cluster, stack, namespace)
    removed = [
        key
        for key in sorted(inventory, key=lambda key: key[1] in KEPT)
        if (volumes or key[1] not in KEPT) and cluster.delete(reference(key))
    ]
    kept = [key for key in inventory if key[1] in KEPT]
    if volumes:
        _wait_gone(cluster, inventory)
    else:
        _wait_gone(cluster, [key for key in inventory if key not in kept])
        if kept:
            _remember(cluster, stack, namespace, kept)
    return removed


def key_of(manifest: Json) -> Key:
    metadata = manifest["metadata"]
    return manifest["apiVersion"], manifest["kind"], metadata.get("namespace", ""), metadata["name"]


def reference(key: Key) -> Json:
    version, kind, namespace, name = key
    return {"apiVersion": version, "kind": kind, "metadata": {"namespace": namespace, "name": name}}


def _refuse_unknown_kinds(cluster: Cluster, manifests: Iterable[Json]) -> None:
    unknown = sorted({f"{m['kind']} ({m['apiVersion']})" for m in manifests if not cluster.knows(m)})
    if unknown:
        raise ValueError(
            f"the cluster does not know {', '.join(unknown)}. Fix: install the operator that brings them, or switch off "
            "what needs them (`slipway:monitoring: {enabled: false}` for Prometheus' kinds)"
        )


def _apply_one(cluster: Cluster, manifest: Json, done: Applied) -> None:
    key = key_of(manifest)
    before = cluster.find(manifest)
    try:
        after = cluster.apply(manifest)
    except ApiError as error:
        # A Job is never changed: one that says so is made anew.
        if (
            error.status != 422
            or before is None
            or "Replace=true" not in manifest["metadata"]["annotations"].get(REPLACE, "")
        ):
            raise ApiError(f"{key[1]} {key[3]}: {error}", status=error.status, reason=error.reason) from None
        cluster.delete(manifest)
        _wait_gone(cluster, [key])
        after = cluster.apply(manifest)
    if before is None:
        done.created.append(key)
    elif before["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"]:
        done.unchanged.append(key)
    else:
        done.changed.append(key)


def _wait_gone(cluster: Cluster, keys: Iterable[Key]) -> None:
    until = time.monotonic() + GONE_S
    for key in keys:
        while (found := cluster.find(reference(key))) is not None:
            if time.monotonic() > until:
                held = ", ".join(found["metadata"].get("finalizers", [])) or "its pods"
                raise ApiError(f"{key[1]} {key[3]} does not go (held by {held})", status=0)
            time.sleep(0.3)


def _inventory(cluster: Cluster, stack: str, namespace: str) -> list[Key]:
    found = cluster.find(_inventory_of(stack, namespace))
    return [tuple(key) for key in json.loads(found["data"]["objects"])] if found else []


def _remember(cluster: Cluster, stack: str, namespace: str, keys: Iterable[Key]) -> None:
    objects = json.dumps(sorted(set(keys)), indent=0)
    cluster.apply(_inventory_of(stack, namespace) | {"data": {"objects": objects}})


def _inventory_of(stack: str, namespace: str) -> Json:
    labels = {"app.kubernetes.io/managed-by": "slipway", "app.kubernetes.io/part-of": "slipway"}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"slipway-inventory-{stack}", "namespace": namespace, "labels": labels},
    }
