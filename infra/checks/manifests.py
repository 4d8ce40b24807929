"""The same rules for Kubernetes objects that others wrote: pure functions over plain values, as `kubectl get -o json` gives them.

A rule here looks at one object; rules that need several (a Service and its pods) are in `manifest_sets`.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from math import ceil
from typing import Any

from infra.checks.finding import Finding
from infra.checks.objects import Json, containers, gpus_of, is_gpu, kind_of, name_of, part, parts, pod_spec, whole

ERRORS = frozenset({"SLW111", "SLW411", "SLW412", "SLW413", "SLW512"})
"""Codes of what can never do what it says; the others warn."""

DEFAULT_GRACE_S = 30
LOADING_S = 60
"""A model server that is given less than this before liveness may kill it is killed while it loads."""
SATURATING = {
    "kv_used_ratio": 1.0,
    "gpu_cache_usage_perc": 1.0,
    "kv_cache_usage_perc": 1.0,
    "DCGM_FI_DEV_GPU_UTIL": 100.0,
}
"""Metrics with a ceiling, by how their names end: a target at or above it never fires."""
EMITTED = (
    "slipway_serve_requests_waiting",
    "slipway_serve_requests_running",
    "slipway_serve_requests_in_flight",
    "slipway_serve_requests_total",
    "slipway_serve_prompt_tokens_total",
    "slipway_serve_output_tokens_total",
    "slipway_serve_kv_used_ratio",
    "slipway_serve_ready",
)
"""What servers emit (docs/contracts.md, Metrics)."""


def gpus_have_limits(manifest: Json) -> Iterator[Finding]:
    """SLW111: a GPU cannot be requested without an equal limit; the API server refuses the pod, when it is made."""
    for container in containers(manifest):
        requests, limits = part(container, "resources", "requests"), part(container, "resources", "limits")
        for name in filter(is_gpu, requests):
            if whole(limits.get(name), 0) != whole(requests[name], 0):
                yield finding(
                    "SLW111",
                    manifest,
                    f"container {container.get('name')!r} requests {requests[name]} of {name}, and its limit is "
                    f"{limits.get(name, 'not set')}",
                    f"limits: {{{name}: {requests[name]}}}",
                )


def gpu_pods_tolerate(manifest: Json) -> Iterator[Finding]:
    """SLW311: GPU nodes are tainted nearly everywhere; a pod without a toleration stays Pending there."""
    if gpus_of(manifest) and not parts(pod_spec(manifest), "tolerations"):
        yield finding(
            "SLW311",
            manifest,
            f"asks for {gpus_of(manifest)} GPUs and tolerates no taint",
            "tolerations of the pool's taint, as {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}",
        )


def models_load_before_liveness(manifest: Json) -> Iterator[Finding]:
    """SLW511: liveness without a startup probe kills a server that is still loading its model, again and again."""
    if not gpus_of(manifest):
        return
    for container in containers(manifest):
        probe = part(container, "livenessProbe")
        if not probe or container.get("startupProbe"):
            continue
        given = whole(probe.get("initialDelaySeconds"), 0)
        given += whole(probe.get("periodSeconds"), 10) * whole(probe.get("failureThreshold"), 3)
        if given < LOADING_S:
            yield finding(
                "SLW511",
                manifest,
                f"container {container.get('name')!r} is killed {given} s after its start unless it answers, and has no startupProbe",
                "a startupProbe whose periodSeconds × failureThreshold is twice the time to load",
            )


def grace_covers_pre_stop(manifest: Json) -> Iterator[Finding]:
    """SLW512: a preStop hook as long as the grace period leaves the process no time: it is killed, its streams with it."""
    grace = whole(pod_spec(manifest).get("terminationGracePeriodSeconds"), DEFAULT_GRACE_S)
    for container in containers(manifest):
        seconds = whole(part(container, "lifecycle", "preStop", "sleep").get("seconds"), 0)
        if seconds and seconds >= grace:
            yield finding(
                "SLW512",
                manifest,
                f"container {container.get('name')!r} sleeps {seconds} s before SIGTERM, and the pod is killed after {grace} s",
                f"terminationGracePeriodSeconds: {seconds + DEFAULT_GRACE_S}, and the time that requests take",
            )


def rollouts_need_no_spare_gpus(manifest: Json) -> Iterator[Finding]:
    """SLW514: a roll-out that starts a GPU pod before it stops one waits for a GPU which may not exist; so by default."""
    strategy = part(manifest, "spec", "strategy")
    if kind_of(manifest) != "Deployment" or not gpus_of(manifest) or strategy.get("type") == "Recreate":
        return
    rolling = part(strategy, "rollingUpdate")
    replicas = whole(part(manifest, "spec").get("replicas"), 1)
    surge = _count(rolling.get("maxSurge", "25%"), of=replicas, up=True)
    unavailable = _count(rolling.get("maxUnavailable", "25%"), of=replicas, up=False)
    if surge and not unavailable and "maxSurge" not in rolling:
        yield finding(
            "SLW514",
            manifest,
            f"a roll-out starts {surge} pod with {gpus_of(manifest)} GPUs more before it stops one (the default of 25%)",
            "rollingUpdate: {maxSurge: 0, maxUnavailable: 1}, or maxSurge: 1 in so many words where there is room",
        )


def jobs_survive_disruption(manifest: Json) -> Iterator[Finding]:
    """SLW515: without a podFailurePolicy an evicted pod counts as a failed one, and bad input is tried again and again."""
    spec = part(manifest, "spec")
    if kind_of(manifest) == "Job" and gpus_of(manifest) and not spec.get("podFailurePolicy"):
        yield finding(
            "SLW515",
            manifest,
            f"{gpus_of(manifest)} GPUs a pod and no podFailurePolicy: evictions use up its {spec.get('backoffLimit', 6)} tries",
            "podFailurePolicy: Ignore on DisruptionTarget, FailJob on the exit code of bad input",
        )


def budgets_let_nodes_go(manifest: Json) -> Iterator[Finding]:
    """SLW513: a disruption budget that allows no pod to go blocks every drain of its nodes, for ever."""
    if kind_of(manifest) != "PodDisruptionBudget":
        return
    spec = part(manifest, "spec")
    if str(spec.get("maxUnavailable")) in ("0", "0%", "0.0") or str(spec.get("minAvailable")) == "100%":
        said = "maxUnavailable: 0" if spec.get("minAvailable") is None else "minAvailable: 100%"
        yield finding("SLW513", manifest, f"{said}: no node under its pods can be drained", "maxUnavailable: 1")


def metrics_exist(manifest: Json) -> Iterator[Finding]:
    """SLW412: an autoscaler on a metric of Slipway's that no server emits; SLW413: a target above what its metric can reach."""
    if kind_of(manifest) != "HorizontalPodAutoscaler":
        return
    for name, target in _targets(manifest):
        if name.startswith("slipway_") and name not in EMITTED:
            near = get_close_matches(name, EMITTED, n=1, cutoff=0)
            yield finding("SLW412", manifest, f"scales on {name}, which nothing emits", f"name: {near[0]}")
        ceiling = next((most for end, most in SATURATING.items() if name.endswith(end)), None)
        if ceiling is not None and target is not None and target >= ceiling:
            yield finding(
                "SLW413",
                manifest,
                f"scales when {name} passes {target:g}, and it never passes {ceiling:g}",
                f"a signal without a ceiling ({EMITTED[2]}), or a target of {0.8 * ceiling:g}",
            )


def pods_are_restricted(manifest: Json) -> Iterator[Finding]:
    """SLW611: containers that may be root, or are privileged: a hole in a model server is one in the node."""
    pod = part(pod_spec(manifest), "securityContext")
    for container in containers(manifest):
        own = part(container, "securityContext")
        user = own.get("runAsUser", pod.get("runAsUser"))
        is_root = user == 0 or not (own.get("runAsNonRoot", pod.get("runAsNonRoot")) or user)
        if own.get("privileged") or is_root:
            said = "is privileged" if own.get("privileged") else "may run as root"
            yield finding(
                "SLW611",
                manifest,
                f"container {container.get('name')!r} {said}",
                "securityContext: {runAsNonRoot: true, allowPrivilegeEscalation: false}",
            )


def images_have_versions(manifest: Json) -> Iterator[Finding]:
    """SLW602: an image called `latest` is another one after each push."""
    for container in containers(manifest):
        image = str(container.get("image") or "")
        tag = image.rsplit("/", 1)[-1].partition(":")[2]
        if image and "@sha256:" not in image and tag in ("", "latest"):
            yield finding("SLW602", manifest, f"{image} is whatever was pushed last", "a version or a digest")


def _count(amount: Any, *, of: int, up: bool) -> int:
    """Pods that a number or a percentage means: surges are rounded up, unavailable pods down."""
    if str(amount).endswith("%"):
        exact = of * float(str(amount)[:-1]) / 100
        return ceil(exact) if up else int(exact)
    return whole(amount, 0)


def _targets(manifest: Json) -> Iterator[tuple[str, float | None]]:
    """Name and target of each metric of an autoscaler that is not a resource's."""
    for metric in parts(part(manifest, "spec"), "metrics"):
        source = part(metric, "pods") or part(metric, "external") or part(metric, "object")
        if source:
            target = part(source, "target")
            amount = target.get("averageValue", target.get("value"))
            yield str(part(source, "metric").get("name")), None if amount is None else _quantity(str(amount))


def _quantity(text: str) -> float | None:
    """`24`, `800m`, `1k`; None for a quantity of another form."""
    scale = {"m": 1e-3, "k": 1e3, "M": 1e6}.get(text[-1:])
    try:
        return float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        return None


def finding(code: str, manifest: Json, message: str, fix: str) -> Finding:
    severity = "error" if code in ERRORS else "warn"
    return Finding(code=code, severity=severity, where=name_of(manifest), message=message, fix=fix)
