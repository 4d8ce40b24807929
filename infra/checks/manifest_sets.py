"""Rules for Kubernetes objects together, and all rules for objects over a set of them: `check_manifests`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from infra.checks.finding import Finding
from infra.checks.grading import graded
from infra.checks.manifests import (
    budgets_let_nodes_go,
    finding,
    gpu_pods_tolerate,
    gpus_have_limits,
    grace_covers_pre_stop,
    images_have_versions,
    jobs_survive_disruption,
    metrics_exist,
    models_load_before_liveness,
    pods_are_restricted,
    rollouts_need_no_spare_gpus,
)
from infra.checks.objects import Json, kind_of, name_of, namespace_of, part, parts, pod_labels, whole
from infra.spec import Severity

SCALABLE = ("Deployment", "StatefulSet")

ManifestCheck = Callable[[Json], Iterator[Finding]]
SetCheck = Callable[[Sequence[Json]], Iterator[Finding]]


def autoscalers_own_replicas(manifests: Sequence[Json]) -> Iterator[Finding]:
    """SLW411: replicas written under an autoscaler: each deployment sets them back, in the middle of the load."""
    scaled = _autoscaled(manifests)
    for manifest in manifests:
        replicas = part(manifest, "spec").get("replicas")
        scaler = scaled.get(_key(manifest))
        if scaler is not None and replicas is not None:
            said = f"replicas: {whole(replicas, 0)} is written, and {name_of(scaler)} scales it"
            yield finding("SLW411", manifest, said, "leave replicas out")


def budgets_can_be_met(manifests: Sequence[Json]) -> Iterator[Finding]:
    """SLW516: a budget that wants as many pods as there are at the least blocks every drain of their nodes."""
    scaled = _autoscaled(manifests)
    workloads = [m for m in manifests if kind_of(m) in SCALABLE]
    for budget in (m for m in manifests if kind_of(m) == "PodDisruptionBudget"):
        least = part(budget, "spec").get("minAvailable")
        wanted = part(budget, "spec", "selector", "matchLabels")
        if least is None or str(least).endswith("%") or not wanted:
            continue
        for workload in workloads:
            if not wanted.items() <= pod_labels(workload).items() or namespace_of(budget) != namespace_of(workload):
                continue
            scaler = scaled.get(_key(workload))
            pods = part(scaler, "spec").get("minReplicas") if scaler else part(workload, "spec").get("replicas")
            if whole(least, 0) >= whole(pods, 1):
                have = f"{name_of(workload)} may have {whole(pods, 1)}: no node under it can be drained"
                said = f"minAvailable: {whole(least, 0)}, and {have}"
                yield finding("SLW516", budget, said, "maxUnavailable: 1, which holds for any number of replicas")


def selectors_find_pods(manifests: Sequence[Json]) -> Iterator[Finding]:
    """SLW312: a Service whose selector matches no pods of the set; one label of several that is wrong is enough."""
    pods = [(namespace_of(m), m, pod_labels(m)) for m in manifests if pod_labels(m)]
    for service in (m for m in manifests if kind_of(m) == "Service"):
        wanted = part(service, "spec", "selector")
        beside = [(m, labels) for namespace, m, labels in pods if namespace == namespace_of(service)]
        near = [(m, labels) for m, labels in beside if wanted.items() & labels.items()]
        if near and not any(wanted.items() <= labels.items() for _, labels in beside):
            nearest, labels = near[0]
            wrong = ", ".join(f"{key}={value}" for key, value in wanted.items() if labels.get(key) != value)
            said = f"selects {wrong}, which no pod has; {name_of(nearest)} has the other labels"
            yield finding("SLW312", service, said, "the labels of the pods")


MANIFEST_CHECKS: tuple[ManifestCheck, ...] = (
    gpus_have_limits,
    gpu_pods_tolerate,
    models_load_before_liveness,
    grace_covers_pre_stop,
    budgets_let_nodes_go,
    rollouts_need_no_spare_gpus,
    jobs_survive_disruption,
    metrics_exist,
    pods_are_restricted,
    images_have_versions,
)
SET_CHECKS: tuple[SetCheck, ...] = (autoscalers_own_replicas, budgets_can_be_met, selectors_find_pods)


def check_manifests(
    manifests: Iterable[Json], *, severities: Mapping[str, Severity] | None = None
) -> tuple[Finding, ...]:
    """All findings of plain Kubernetes objects, errors first."""
    objects = [item for manifest in manifests for item in _items(manifest)]
    found = [one for rule in MANIFEST_CHECKS for manifest in objects for one in rule(manifest)]
    found += [one for rule in SET_CHECKS for one in rule(objects)]
    return graded(found, severities or {})


def _items(manifest: Json) -> list[Json]:
    """The objects of a List, or the object."""
    items: Any = manifest.get("items")
    return parts(manifest, "items") if isinstance(items, list) else [manifest]


def _autoscaled(manifests: Sequence[Json]) -> dict[tuple[str, str, str], Json]:
    """(kind, namespace, name) of what is scaled → its autoscaler."""
    scalers = (m for m in manifests if kind_of(m) == "HorizontalPodAutoscaler")
    targets = ((scaler, part(scaler, "spec", "scaleTargetRef")) for scaler in scalers)
    return {(str(ref.get("kind")), namespace_of(scaler), str(ref.get("name"))): scaler for scaler, ref in targets}


def _key(manifest: Json) -> tuple[str, str, str]:
    return kind_of(manifest), namespace_of(manifest), str(part(manifest, "metadata").get("name"))
