"""The pod that Jobs and Deployments share: security, scratch space, volumes, placement."""

from collections.abc import Sequence
from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs, ObjectMetaArgs

from infra.clouds import POOL_LABEL, Placement
from infra.components.common import Scope, container_security, env, pod_security

TMP = "/tmp"  # noqa: S108 — an emptyDir of the pod's own
SCRATCH = core.VolumeMountArgs(name="tmp", mount_path=TMP)
# Programs that want to write under $HOME (matplotlib, torch's caches) find the only place that can be written.
HOME = env(HOME=TMP)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A PersistentVolumeClaim and where it is mounted."""

    claim: str
    mount_path: str
    read_only: bool = False

    @property
    def mount(self) -> core.VolumeMountArgs:
        return core.VolumeMountArgs(name=self.claim, mount_path=self.mount_path, read_only=self.read_only or None)

    @property
    def volume(self) -> core.VolumeArgs:
        # Never read-only here: two pods of one node would then disagree about how the claim is attached.
        source = core.PersistentVolumeClaimVolumeSourceArgs(claim_name=self.claim)
        return core.VolumeArgs(name=self.claim, persistent_volume_claim=source)


@dataclass(frozen=True, kw_only=True)
class PodArgs:
    component: str
    """`data`, `train`, `meet`, `promote`, `serve`, `batch` or `router`: label, and name of the ServiceAccount."""
    instance: str
    placement: Placement
    containers: Sequence[core.ContainerArgs]
    init_containers: Sequence[core.ContainerArgs] = ()
    volumes: Sequence[core.VolumeArgs] = ()
    annotations: dict[str, str] | None = None
    grace_s: int
    """Time from SIGTERM (and the preStop hook) to SIGKILL, seconds."""
    restart_policy: str = "Always"
    subdomain: str | None = None
    affinity: core.AffinityArgs | None = None
    """Overrides the placement's."""
    spread: bool = False
    """Prefer other hosts and zones for each replica."""


def container(
    *,
    name: str,
    image: pulumi.Input[str],
    command: Sequence[pulumi.Input[str]],
    resources: core.ResourceRequirementsArgs,
    mounts: Sequence[core.VolumeMountArgs] = (),
    variables: Sequence[core.EnvVarArgs] = (),
    ports: dict[str, int] | None = None,
    lifecycle: core.LifecycleArgs | None = None,
    startup: core.ProbeArgs | None = None,
    readiness: core.ProbeArgs | None = None,
    liveness: core.ProbeArgs | None = None,
) -> core.ContainerArgs:
    """A container; each named port is also told to the process as `<NAME>_PORT` (docs/contracts.md, Environment)."""
    told = env(**{f"{port.upper()}_PORT": str(number) for port, number in (ports or {}).items()})
    return core.ContainerArgs(
        name=name,
        image=image,
        image_pull_policy="IfNotPresent",
        command=list(command),
        # Ports first: Kubernetes expands `$(HTTP_PORT)` only in what comes after it.
        env=[*told, *HOME, *variables],
        ports=[core.ContainerPortArgs(name=port, container_port=number) for port, number in (ports or {}).items()]
        or None,
        resources=resources,
        volume_mounts=[SCRATCH, *mounts],
        security_context=container_security(),
        lifecycle=lifecycle,
        startup_probe=startup,
        readiness_probe=readiness,
        liveness_probe=liveness,
    )


def pod_template(scope: Scope, args: PodArgs) -> core.PodTemplateSpecArgs:
    """The pod of a Job or a Deployment."""
    labels = scope.labels(args.component, args.instance)
    return core.PodTemplateSpecArgs(
        metadata=ObjectMetaArgs(labels=labels, annotations=args.annotations),
        spec=core.PodSpecArgs(
            service_account_name=args.component,
            automount_service_account_token=False,
            # One environment variable a Service is a leak between neighbours, and slows large namespaces down.
            enable_service_links=False,
            security_context=pod_security(),
            image_pull_secrets=[core.LocalObjectReferenceArgs(name=scope.pull_secret)] if scope.pull_secret else None,
            runtime_class_name=args.placement.runtime_class,
            node_selector=args.placement.node_selector or None,
            tolerations=_tolerations(args.placement),
            affinity=args.affinity or _prefer_other_nodes(args.placement),
            topology_spread_constraints=_spread(labels) if args.spread else None,
            init_containers=list(args.init_containers) or None,
            containers=list(args.containers),
            volumes=[core.VolumeArgs(name="tmp", empty_dir=core.EmptyDirVolumeSourceArgs()), *args.volumes],
            termination_grace_period_seconds=args.grace_s,
            restart_policy=args.restart_policy,
            subdomain=args.subdomain,
        ),
    )


def _tolerations(placement: Placement) -> list[core.TolerationArgs] | None:
    return [
        core.TolerationArgs(key=POOL_LABEL, operator="Equal", value=pool, effect="NoSchedule")
        for pool in placement.tolerated_pools
    ] or None


def _prefer_other_nodes(placement: Placement) -> core.AffinityArgs | None:
    """Nodes of no pool first, where a pod does not need the pool's GPUs."""
    if placement.avoid_label is None:
        return None
    absent = core.NodeSelectorRequirementArgs(key=placement.avoid_label, operator="DoesNotExist")
    term = core.PreferredSchedulingTermArgs(
        weight=100, preference=core.NodeSelectorTermArgs(match_expressions=[absent])
    )
    return core.AffinityArgs(
        node_affinity=core.NodeAffinityArgs(preferred_during_scheduling_ignored_during_execution=[term])
    )


def _spread(labels: dict[str, str]) -> list[core.TopologySpreadConstraintArgs]:
    """Over zones, then hosts; never a reason to stay Pending."""
    match = {key: labels[key] for key in ("app.kubernetes.io/component", "app.kubernetes.io/instance")}
    return [
        core.TopologySpreadConstraintArgs(
            max_skew=1,
            topology_key=key,
            when_unsatisfiable="ScheduleAnyway",
            label_selector=LabelSelectorArgs(match_labels=match),
        )
        for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
    ]
