"""A served model: Deployment, Services, disruption budget. It follows a registry channel and comes up when that has a digest."""

from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.apps import v1 as apps
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs, ObjectMetaArgs
from pulumi_kubernetes.policy import v1 as policy

from infra.clouds import Placement
from infra.components.common import SKIP_AWAIT, Scope, digest, memory_quantity, selector
from infra.components.model_registry import RegistryAccess
from infra.components.pods import PodArgs, pod_template
from infra.components.server import Server, cache_claim, ports
from infra.components.stage import Image
from infra.spec import Runtime, Service
from infra.spec.serving import EXIT_S, LINGER_S, PRE_STOP_S

SCRAPED = {"slipway.dev/endpoints": "pods"}
"""Label of the Services by which Prometheus finds each replica once."""
FOUND_AFTER_S = PRE_STOP_S + 2
"""Until a replica that is ready is sent requests, with a margin."""


@dataclass(frozen=True, kw_only=True)
class InferenceServiceArgs:
    scope: Scope
    service: Service
    runtime: Runtime
    image: Image
    registry: RegistryAccess
    placement: Placement
    load_s: int
    """Estimated time to load the model, seconds."""
    kv_tokens: int | None
    """Tokens that the KV cache holds; None when the stack does not say the model's shape."""
    model_within_s: int
    """Time until the channel can be expected to have a model, seconds: a training of the same stack takes its hours."""
    collector_url: str | None
    """Where Slipway's own server sends its spans; None: nowhere."""
    shared_storage: bool
    """The storage class gives volumes that pods of several nodes share."""
    storage_class: str | None


class InferenceService(pulumi.ComponentResource):
    def __init__(self, name: str, args: InferenceServiceArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:InferenceService", name, None, opts)
        service, scope = args.service, args.scope
        self.labels = selector("serve", service.name)
        self.ports = ports(service, args.runtime)
        budget = policy.PodDisruptionBudget(
            f"{name}-budget",
            metadata=scope.meta(service.name, component="serve"),
            spec=policy.PodDisruptionBudgetSpecArgs(
                # Never `minAvailable`: with one replica it would block every node drain for ever.
                max_unavailable=1,
                selector=LabelSelectorArgs(match_labels=self.labels),
                # Pods that wait for a model hold nothing up.
                unhealthy_pod_eviction_policy="AlwaysAllow",
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )
        self._service(name, service.name, scope, headless=False)
        self._service(f"{name}-pods", pods_service(service.name), scope, headless=True)
        if service.cache_gib:
            self._cache(name, args, size_gib=service.cache_gib)
        apps.Deployment(
            f"{name}-deployment",
            metadata=scope.meta(service.name, component="serve", annotations=SKIP_AWAIT),
            spec=self._deployment(args, files=self._files(name, args)),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[budget, *args.image.needs]),
        )
        self.register_outputs({"service": service.name})

    def _service(self, name: str, object_name: str, scope: Scope, *, headless: bool) -> None:
        """A headless Service names pods, so its ports are theirs, all of them: Prometheus reads one."""
        labels = scope.labels("serve", self.labels["app.kubernetes.io/instance"])
        shown = self.ports if headless else {"http": self.ports["http"]}
        core.Service(
            f"{name}-service",
            metadata=ObjectMetaArgs(
                name=object_name,
                namespace=scope.namespace,
                labels=labels | SCRAPED if headless else labels,
                # A Service without ready endpoints is right as long as there is no model.
                annotations=SKIP_AWAIT,
            ),
            spec=core.ServiceSpecArgs(
                type="ClusterIP",
                cluster_ip="None" if headless else None,
                selector=self.labels,
                ports=[
                    core.ServicePortArgs(name=port, port=number, target_port=port, app_protocol="http")
                    for port, number in shown.items()
                ],
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _cache(self, name: str, args: InferenceServiceArgs, *, size_gib: float) -> None:
        core.PersistentVolumeClaim(
            f"{name}-cache",
            metadata=args.scope.meta(cache_claim(args.service), component="storage", annotations=SKIP_AWAIT),
            spec=core.PersistentVolumeClaimSpecArgs(
                access_modes=["ReadWriteMany" if args.shared_storage else "ReadWriteOnce"],
                storage_class_name=args.storage_class,
                resources=core.VolumeResourceRequirementsArgs(requests={"storage": memory_quantity(size_gib)}),
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _files(self, name: str, args: InferenceServiceArgs) -> str | None:
        """Name of the ConfigMap with the runtime's files; it follows the content, so that a change rolls the pods."""
        files = args.runtime.files
        if not files:
            return None
        object_name = f"{args.service.name}-runtime-{digest(files)}"
        core.ConfigMap(
            f"{name}-runtime",
            metadata=args.scope.meta(object_name, component="serve"),
            data=dict(files),
            immutable=True,
            opts=pulumi.ResourceOptions(parent=self),
        )
        return object_name

    def _deployment(self, args: InferenceServiceArgs, *, files: str | None) -> apps.DeploymentSpecArgs:
        service = args.service
        server = Server(
            service=service,
            runtime=args.runtime,
            image=args.image.reference,
            registry=args.registry,
            gpu_resource=args.scope.gpu_resource,
            load_s=args.load_s,
            kv_tokens=args.kv_tokens,
            files=files,
            collector_url=args.collector_url,
        )
        surge, unavailable = (1, 0) if service.surge else (0, 1)
        return apps.DeploymentSpecArgs(
            # Under an autoscaler the number of replicas is its own: a written one would fight it (pulumi-kubernetes#2491).
            replicas=None if service.autoscaling else service.fixed_replicas,
            selector=LabelSelectorArgs(match_labels=self.labels),
            strategy=apps.DeploymentStrategyArgs(
                type="RollingUpdate",
                rolling_update=apps.RollingUpdateDeploymentArgs(max_surge=surge, max_unavailable=unavailable),
            ),
            # An old replica goes when the router can have found the new one, and not when that is ready.
            min_ready_seconds=FOUND_AFTER_S,
            progress_deadline_seconds=args.model_within_s + 600 + 4 * args.load_s,
            revision_history_limit=5,
            template=pod_template(
                args.scope,
                PodArgs(
                    component="serve",
                    instance=service.name,
                    placement=args.placement,
                    containers=[server.container],
                    init_containers=server.init_containers,
                    volumes=server.volumes,
                    grace_s=PRE_STOP_S + LINGER_S + service.drain_s + EXIT_S,
                    spread=True,
                ),
            ),
        )


def pods_service(service: str) -> str:
    """Name of the headless Service that resolves to the ready pods of `service`."""
    return f"{service}-pods"
