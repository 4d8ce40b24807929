"""What every object of a stack shares: where it lives, labels, the restricted security context, digests, quantities."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pulumi
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import ObjectMetaArgs

from infra.spec import PodResources

# Jobs, Deployments and volumes reach their goal when a model is trained or a pod is scheduled, which takes hours: `pulumi up`
# does not wait for it (pulumi-kubernetes#712).
SKIP_AWAIT = {"pulumi.com/skipAwait": "true"}
# A Job's pod template is immutable. Pulumi replaces the Job by itself; Argo CD and Flux have to be told to.
REPLACE = {"argocd.argoproj.io/sync-options": "Force=true,Replace=true", "kustomize.toolkit.fluxcd.io/force": "enabled"}

USER = 65532
"""The `nonroot` user of the images."""
DIGEST_CHARS = 10


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where the objects of one stack live and what they are labelled with."""

    namespace: pulumi.Input[str]
    team: str
    gpu_resource: str
    pull_secret: str | None = None

    def labels(self, component: str, instance: str) -> dict[str, str]:
        """Labels of an object; the `selector` is a part of them."""
        return {
            **selector(component, instance),
            "app.kubernetes.io/managed-by": "slipway",
            "app.kubernetes.io/part-of": "slipway",
            "slipway.dev/team": self.team,
        }

    def meta(
        self, name: str, *, component: str, instance: str | None = None, annotations: Mapping[str, str] | None = None
    ) -> ObjectMetaArgs:
        """Metadata of a namespaced object."""
        return ObjectMetaArgs(
            name=name,
            namespace=self.namespace,
            labels=self.labels(component, instance or name),
            annotations=dict(annotations) if annotations else None,
        )


def selector(component: str, instance: str) -> dict[str, str]:
    """The labels by which Services, budgets, policies and monitors find the pods of one workload."""
    return {"app.kubernetes.io/component": component, "app.kubernetes.io/instance": instance}


def component_selector(component: str) -> dict[str, str]:
    """The label that all pods of one kind (`serve`, `train`, …) have."""
    return {"app.kubernetes.io/component": component}


def digest(value: object) -> str:
    """Short sha256 of the canonical JSON of `value`: what names of Jobs and immutable ConfigMaps end in."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]


def pod_security() -> core.PodSecurityContextArgs:
    """Pod Security Standard `restricted`; the group owns mounted volumes, so that a non-root user can write them."""
    return core.PodSecurityContextArgs(
        run_as_non_root=True,
        run_as_user=USER,
        run_as_group=USER,
        fs_group=USER,
        # Without this, every start walks the whole volume to change owners.
        fs_group_change_policy="OnRootMismatch",
        seccomp_profile=core.SeccompProfileArgs(type="RuntimeDefault"),
    )


def container_security() -> core.SecurityContextArgs:
    """Pod Security Standard `restricted`, and a root filesystem that nobody writes."""
    return core.SecurityContextArgs(
        allow_privilege_escalation=False,
        read_only_root_filesystem=True,
        capabilities=core.CapabilitiesArgs(drop=["ALL"]),
    )


def cpu_quantity(cpus: float) -> str:
    """`2`, `500m`."""
    return str(int(cpus)) if cpus == int(cpus) else f"{int(cpus * 1000)}m"


def memory_quantity(gib: float) -> str:
    """`4Gi`, `1536Mi`."""
    return f"{int(gib)}Gi" if gib == int(gib) else f"{int(gib * 1024)}Mi"


def resources(of: PodResources, *, gpus: int = 0, gpu_resource: str) -> core.ResourceRequirementsArgs:
    """Requests that equal limits: the pod is of class Guaranteed, and is neither throttled by neighbours nor evicted first."""
    amounts = {"cpu": cpu_quantity(of.cpus), "memory": memory_quantity(of.memory_gib)}
    if gpus:
        amounts[gpu_resource] = str(gpus)
    return core.ResourceRequirementsArgs(requests=amounts, limits=dict(amounts))


def env(**variables: str) -> list[core.EnvVarArgs]:
    """Plain environment variables, in order."""
    return [core.EnvVarArgs(name=name, value=value) for name, value in variables.items()]


def threads_from_limit() -> core.EnvVarArgs:
    """`OMP_NUM_THREADS` = CPUs of the container, rounded up: without it, a process starts a thread for each CPU of the node."""
    source = core.ResourceFieldSelectorArgs(resource="limits.cpu", divisor="1")
    return core.EnvVarArgs(name="OMP_NUM_THREADS", value_from=core.EnvVarSourceArgs(resource_field_ref=source))


def read_only_config(name: str) -> core.VolumeArgs:
    """Volume `config` with the files of ConfigMap `name`."""
    return core.VolumeArgs(name="config", config_map=core.ConfigMapVolumeSourceArgs(name=name))


def plain(value: Any) -> Any:
    """`value` without keys whose value is None, at every depth."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items() if inner is not None}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    return value
