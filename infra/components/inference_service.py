"""A served model: Deployment, Services, disruption budget. It follows a registry channel and comes up when that has a digest."""

from dataclasses import dataclass
from math import ceil

import pulumi
from pulumi_kubernetes.apps import v1 as apps
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs, ObjectMetaArgs
from pulumi_kubernetes.policy import v1 as policy

from infra.clouds import Placement
from infra.components.common import SKIP_AWAIT, Scope, resources, selector, threads_from_limit
from infra.components.model_registry import RegistryAccess
from infra.components.pods import PodArgs, container, pod_template
from infra.components.stage import Image
from infra.spec import Service

HTTP_PORT = 8000
SCRAPED = {"slipway.dev/endpoints": "pods"}
"""Label of the Services by which Prometheus finds each replica once."""
# Before SIGTERM: the time that Services, DNS and routers need to stop sending.
PRE_STOP_S = 5
# After the drain: closing sockets, the engine's exit.
MARGIN_S = 10
# Importing torch and starting CUDA before the port is open, with room for a cold disk.
START_S = 60


@dataclass(frozen=True, kw_only=True)
class InferenceServiceArgs:
    scope: Scope
    service: Service
    image: Image
    registry: RegistryAccess
    placement: Placement
    load_s: int
    """Estimated time to load the model, seconds."""
    model_within_s: int
    """Time until the channel can be expected to have a model, seconds: a training of the same stack takes its hours."""


class InferenceService(pulumi.ComponentResource):
    def __init__(self, name: str, args: InferenceServiceArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:InferenceService", name, None, opts)
        service, scope = args.service, args.scope
        self.labels = selector("serve", service.name)
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
        apps.Deployment(
            f"{name}-deployment",
            metadata=scope.meta(service.name, component="serve", annotations=SKIP_AWAIT),
            spec=self._deployment(args),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[budget, *args.image.needs]),
        )
        self.register_outputs({"service": service.name})

    def _service(self, name: str, object_name: str, scope: Scope, *, headless: bool) -> None:
        labels = scope.labels("serve", self.labels["app.kubernetes.io/instance"])
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
                # A headless Service names pods, so its port is theirs.
                ports=[core.ServicePortArgs(name="http", port=HTTP_PORT, target_port="http", app_protocol="http")],
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _deployment(self, args: InferenceServiceArgs) -> apps.DeploymentSpecArgs:
        service = args.service
        surge, unavailable = (1, 0) if service.surge else (0, 1)
        return apps.DeploymentSpecArgs(
            # Under an autoscaler the number of replicas is its own: a written one would fight it (pulumi-kubernetes#2491).
            replicas=None if service.autoscaling else service.fixed_replicas,
            selector=LabelSelectorArgs(match_labels=self.labels),
            strategy=apps.DeploymentStrategyArgs(
                type="RollingUpdate",
                rolling_update=apps.RollingUpdateDeploymentArgs(max_surge=surge, max_unavailable=unavailable),
            ),
            progress_deadline_seconds=args.model_within_s + 600 + 4 * args.load_s,
            revision_history_limit=5,
            template=pod_template(
                args.scope,
                PodArgs(
                    component="serve",
                    instance=service.name,
                    placement=args.placement,
                    containers=[self._server(args)],
                    volumes=[claim.volume for claim in args.registry.claims],
                    grace_s=PRE_STOP_S + service.drain_s + MARGIN_S,
                    spread=True,
                ),
            ),
        )

    def _server(self, args: InferenceServiceArgs) -> core.ContainerArgs:
        service = args.service
        # The port opens before the model is there, and `live` says so: what waits for its channel is not killed.
        live = core.HTTPGetActionArgs(path="/health/live", port="http")
        ready = core.HTTPGetActionArgs(path="/health/ready", port="http")
        budget_s = START_S + 2 * args.load_s
        return container(
            name="server",
            image=args.image.reference,
            command=[
                "python",
                "-m",
                "serving",
                args.registry.channel(service.model, service.channel),
                *_flags(service),
            ],
            resources=resources(service.resources, gpus=service.gpus, gpu_resource=args.scope.gpu_resource),
            mounts=[claim.mount for claim in args.registry.claims],
            ports={"http": HTTP_PORT},
            variables=[threads_from_limit()],
            lifecycle=core.LifecycleArgs(
                pre_stop=core.LifecycleHandlerArgs(sleep=core.SleepActionArgs(seconds=PRE_STOP_S))
            ),
            startup=core.ProbeArgs(
                http_get=live, period_seconds=2, timeout_seconds=2, failure_threshold=ceil(budget_s / 2)
            ),
            readiness=core.ProbeArgs(http_get=ready, period_seconds=2, timeout_seconds=2, failure_threshold=2),
            # A minute without an answer: the process is stuck, and not merely busy.
            liveness=core.ProbeArgs(http_get=live, period_seconds=10, timeout_seconds=5, failure_threshold=6),
        )


def pods_service(service: str) -> str:
    """Name of the headless Service that resolves to the ready pods of `service`."""
    return f"{service}-pods"


def _flags(service: Service) -> list[str]:
    flags = {
        "--host": "0.0.0.0",  # noqa: S104 — a pod's own network; who may reach it, the NetworkPolicies say
        "--port": "$(HTTP_PORT)",
        "--served-name": service.model,
        "--max-model-len": service.max_model_len,
        "--max-num-seqs": service.max_num_seqs,
        "--max-queued-tokens": service.max_queued_tokens,
        "--kv-bytes": int(service.kv_gib * 2**30),
        "--dtype": service.dtype,
        "--drain-s": service.drain_s,
    }
    return [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
