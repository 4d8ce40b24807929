"""Kubernetes objects as plain dicts, and the few questions that the runner asks of them."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import yaml

Json = dict[str, Any]

# Kinds that would run something, and that one machine does not run.
UNSUPPORTED = frozenset({"CronJob", "DaemonSet", "Pod", "ReplicaSet", "StatefulSet"})

_SUFFIX = {
    **{"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15},
    **{"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50},
}


class ManifestError(ValueError):
    """Manifests that cannot run on one machine: one line, `WHAT (WHERE). FIX`."""


def digest(value: object) -> str:
    """Sha256 of the canonical JSON of `value`: what decides whether something changed."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity (`500m`, `2`, `1Gi`, `1e3`) as a number. Raises ManifestError."""
    text = str(text)
    try:
        for suffix in (text[-2:], text[-1:]):
            if suffix in _SUFFIX:
                return float(text.removesuffix(suffix)) * _SUFFIX[suffix]
        return float(text)
    except ValueError:
        raise ManifestError(f"{text!r} is no quantity. Write a number with a suffix such as m, Mi or Gi") from None


def int_or_percent(value: int | str, *, of: int, round_up: bool) -> int:
    """`maxSurge` (rounded up) or `maxUnavailable` (rounded down): a count, or a percentage `of` the replicas."""
    if isinstance(value, int):
        return value
    share = of * float(value.removesuffix("%")) / 100
    return math.ceil(share) if round_up else math.floor(share)


@dataclass(frozen=True)
class Workload:
    """A Job or a Deployment, with the few things that both have."""

    kind: str
    namespace: str
    name: str
    spec: Json
    count: int  # replicas of a Deployment, completions of a Job
    template: Json

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def pod_spec(self) -> Json:
        return self.template["spec"]

    @property
    def containers(self) -> list[Json]:
        return [*entries(self.pod_spec, "initContainers"), *entries(self.pod_spec, "containers")]

    @cached_property
    def labels(self) -> dict[str, str]:
        """Labels of its pods, with those that the Job controller adds."""
        labels: dict[str, str] = dict(section(self.template, "metadata", "labels"))
        if self.kind == "Job":
            labels |= {"batch.kubernetes.io/job-name": self.name, "job-name": self.name}
        return labels

    @cached_property
    def container_ports(self) -> dict[int, str | None]:
        """Number → name of every container port; the containers of a pod share one network, so a number is one port."""
        return {p["containerPort"]: p.get("name") for c in self.containers for p in entries(c, "ports")}

    @property
    def indexed(self) -> bool:
        return self.spec.get("completionMode") == "Indexed"

    def pod_name(self, slot: int) -> str:
        return f"{self.name}-{slot}"

    def port_number(self, port: int | str) -> int | None:
        """The container port that a Service's targetPort or a probe's port means; None when no container has it."""
        if isinstance(port, int):
            return port if port in self.container_ports else None
        return next((number for number, name in self.container_ports.items() if name == port), None)


@dataclass(frozen=True)
class Manifests:
    """Every object of one rendered stack."""

    objects: tuple[Json, ...]

    @classmethod
    def load(cls, directory: Path) -> "Manifests":
        """Read every `*.yaml`, `*.yml` and `*.json` under `directory`. Raises ManifestError, naming the file."""
        if not directory.is_dir():
            raise ManifestError(f"no manifests ({directory} is no directory). Run `slipway render` first")
        found = tuple(
            manifest
            for path in sorted(directory.rglob("*"))
            if path.suffix in (".yaml", ".yml", ".json") and path.is_file()
            for manifest in _read(path)
        )
        if not found:
            raise ManifestError(f"no manifests ({directory} holds no Kubernetes object). Run `slipway render` first")
        return cls(found)

    def of_kind(self, kind: str) -> list[Json]:
        return [o for o in self.objects if o["kind"] == kind]

    def find(self, kind: str, *, namespace: str, name: str) -> Json | None:
        return next((o for o in self.of_kind(kind) if (namespace_of(o), name_of(o)) == (namespace, name)), None)

    @cached_property
    def digest(self) -> str:
        return digest(sorted(digest(o) for o in self.objects))

    @cached_property
    def workloads(self) -> list[Workload]:
        """Jobs, then Deployments. Raises ManifestError where two would share a name on one machine."""
        found = [*map(_job, self.of_kind("Job")), *(_deployment(self, o) for o in self.of_kind("Deployment"))]
        for what, names in (
            ("Jobs or Deployments", [w.name for w in found]),
            ("PersistentVolumeClaims", [name_of(o) for o in self.of_kind("PersistentVolumeClaim")]),
        ):
            twice = [name for name, times in Counter(names).items() if times > 1]
            if twice:
                raise ManifestError(
                    f"two {what} are called {twice[0]!r}, and one machine has no namespaces. Rename one of them"
                )
        return found

    @cached_property
    def services(self) -> list[Json]:
        """Services that select pods."""
        return [s for s in self.of_kind("Service") if section(s, "spec", "selector")]

    def behind(self, service: Json) -> list[Workload]:
        """The workloads whose pods a Service selects."""
        wanted = cast("dict[str, str]", service["spec"]["selector"]).items()
        return [w for w in self.workloads if w.namespace == namespace_of(service) and wanted <= w.labels.items()]


def section(manifest: Json, *keys: str) -> Json:
    """The dict at a path of keys; {} where any of it is absent or null."""
    for key in keys:
        manifest = manifest.get(key) or {}
    return manifest


def entries(manifest: Json, key: str) -> list[Json]:
    """The list of dicts at `key`; [] where it is absent or null."""
    return manifest.get(key) or []


def name_of(manifest: Json) -> str:
    return manifest["metadata"]["name"]


def namespace_of(manifest: Json) -> str:
    return manifest["metadata"].get("namespace") or "default"


def _read(path: Path) -> Iterator[Json]:
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise ManifestError(f"not YAML: {why} ({path}). Render it again") from None
    for document in documents:
        # `plan.json` and the like lie beside the manifests: only what calls itself a Kubernetes object is one.
        if not isinstance(document, dict) or not {"apiVersion", "kind"} <= cast("Json", document).keys():
            continue
        manifest = cast("Json", document)
        items: list[Json] = manifest["items"] if manifest["kind"].endswith("List") else [manifest]
        for item in items:
            if not isinstance(item.get("metadata"), dict) or not item["metadata"].get("name"):
                raise ManifestError(f"{item['kind']} has no metadata.name ({path}). Give it one")
            yield item


def _pod_template(manifest: Json) -> Json:
    template = section(manifest, "spec", "template")
    if not entries(section(template, "spec"), "containers"):
        raise ManifestError(f"no containers ({manifest['kind']}/{name_of(manifest)}). Give its pod template one")
    return template


def _job(manifest: Json) -> Workload:
    spec = section(manifest, "spec")
    completions = spec.get("completions")
    count = spec.get("parallelism", 1) if completions is None else completions
    template = _pod_template(manifest)
    return Workload("Job", namespace_of(manifest), name_of(manifest), spec, count, template)


def _deployment(manifests: Manifests, manifest: Json) -> Workload:
    """A Deployment without `replicas` has the least that its autoscaler allows."""
    spec, name, namespace = section(manifest, "spec"), name_of(manifest), namespace_of(manifest)
    replicas = spec.get("replicas")
    if replicas is None:
        targets = (
            a["spec"].get("minReplicas", 1)
            for a in manifests.of_kind("HorizontalPodAutoscaler")
            if namespace_of(a) == namespace
            and (a["spec"]["scaleTargetRef"]["kind"], a["spec"]["scaleTargetRef"]["name"]) == ("Deployment", name)
        )
        replicas = next(targets, 1)
    return Workload("Deployment", namespace, name, spec, replicas, _pod_template(manifest))
