"""Envoy before the services: one Deployment, its configuration, and the Service that clients call.

Envoy exits at once on SIGTERM. What drains it is the preStop hook: for as long as the longest drain of a service behind it, the
pod is out of the endpoints and gets no new connections, streams in flight run on, and connections that are kept alive are asked
to close when they are `CONNECTION_AGE_S` old, which is inside that time. A stream that outlives the hook is cut, as one that
outlives `drain_s` is at a server.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pulumi
import yaml
from pulumi_kubernetes.apps import v1 as apps
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs
from pulumi_kubernetes.policy import v1 as policy

from infra.clouds import Placement
from infra.components.common import SKIP_AWAIT, Scope, digest, read_only_config, resources, selector
from infra.components.envoy import ADMIN_PORT, CONNECTION_AGE_S, HTTP_PORT, METRICS_PORT, Backend, bootstrap
from infra.components.inference_service import pods_service
from infra.components.pods import PodArgs, container, pod_template
from infra.components.server import ready_path
from infra.spec import PodResources, Runtime, Service
from infra.spec import Router as RouterSpec

NAME = "router"
RESOURCES = PodResources(cpus=0.5, memory_gib=0.5)
PROPAGATION_S = 5
MARGIN_S = 10


@dataclass(frozen=True, kw_only=True)
class RouterArgs:
    scope: Scope
    router: RouterSpec
    services: Sequence[Service]
    runtimes: Sequence[Runtime]
    """What answers behind each of `services`."""
    image: str
    placement: Placement


class Router(pulumi.ComponentResource):
    def __init__(self, name: str, args: RouterArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:Router", name, None, opts)
        self.labels = selector("router", NAME)
        backends = [backend(*pair) for pair in zip(args.services, args.runtimes, strict=True)]
        text = yaml.safe_dump(bootstrap(args.router, backends), sort_keys=True)
        # The name follows the content, so that a change rolls the pods, and those that are still there keep their file.
        config_name = f"{NAME}-{digest(text)}"
        config = core.ConfigMap(
            f"{name}-config",
            metadata=args.scope.meta(config_name, component="router"),
            data={"envoy.yaml": text},
            immutable=True,
            opts=pulumi.ResourceOptions(parent=self),
        )
        apps.Deployment(
            f"{name}-deployment",
            metadata=args.scope.meta(NAME, component="router", annotations=SKIP_AWAIT),
            spec=self._deployment(args, config_name),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[config]),
        )
        service = core.Service(
            f"{name}-service",
            metadata=args.scope.meta(NAME, component="router", annotations=_await(args.router.expose)),
            spec=core.ServiceSpecArgs(
                type=args.router.expose,
                selector=self.labels,
                ports=[
                    core.ServicePortArgs(name="http", port=args.router.port, target_port="http", app_protocol="http")
                ],
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )
        if args.router.replicas > 1:
            policy.PodDisruptionBudget(
                f"{name}-budget",
                metadata=args.scope.meta(NAME, component="router"),
                spec=policy.PodDisruptionBudgetSpecArgs(
                    max_unavailable=1,
                    selector=LabelSelectorArgs(match_labels=self.labels),
                    unhealthy_pod_eviction_policy="AlwaysAllow",
                ),
                opts=pulumi.ResourceOptions(parent=self),
            )
        self.endpoint = self._endpoint(args, service)
        self.register_outputs({"endpoint": self.endpoint})

    def _endpoint(self, args: RouterArgs, service: core.Service) -> pulumi.Output[str]:
        """URL of the endpoint: the load balancer's address once it has one, else the name inside the cluster."""
        inside = pulumi.Output.concat("http://", NAME, ".", args.scope.namespace, f":{args.router.port}")
        if args.router.expose == "ClusterIP":
            return inside

        def outside(status: core.outputs.ServiceStatus | None, name: str) -> str:
            balancer = status.load_balancer if status else None
            first = balancer.ingress[0] if balancer and balancer.ingress else None
            address = (first.hostname or first.ip) if first else None
            return f"http://{address}:{args.router.port}" if address else name

        return pulumi.Output.all(service.status, inside).apply(lambda pair: outside(pair[0], pair[1]))

    def _deployment(self, args: RouterArgs, config_name: str) -> apps.DeploymentSpecArgs:
        drain_s = PROPAGATION_S + max([CONNECTION_AGE_S, *(service.drain_s for service in args.services)])
        ready = core.ProbeArgs(
            http_get=core.HTTPGetActionArgs(path="/ready", port="metrics"), period_seconds=2, timeout_seconds=2
        )
        envoy = container(
            name="envoy",
            image=args.image,
            # Hot restart wants shared memory that a read-only pod does not have, and pods are replaced as a whole.
            command=[
                "envoy",
                "-c",
                "/config/envoy.yaml",
                "--log-level",
                "warning",
                "--concurrency",
                "2",
                "--disable-hot-restart",
            ],
            resources=resources(RESOURCES, gpu_resource=args.scope.gpu_resource),
            mounts=[core.VolumeMountArgs(name="config", mount_path="/config", read_only=True)],
            ports={"http": HTTP_PORT, "metrics": METRICS_PORT, "admin": ADMIN_PORT},
            lifecycle=core.LifecycleArgs(
                pre_stop=core.LifecycleHandlerArgs(sleep=core.SleepActionArgs(seconds=drain_s))
            ),
            readiness=ready,
            liveness=core.ProbeArgs(
                tcp_socket=core.TCPSocketActionArgs(port="metrics"),
                period_seconds=10,
                timeout_seconds=5,
                failure_threshold=6,
            ),
        )
        return apps.DeploymentSpecArgs(
            replicas=args.router.replicas,
            selector=LabelSelectorArgs(match_labels=self.labels),
            # Envoy is small: a new one is there before an old one goes.
            strategy=apps.DeploymentStrategyArgs(
                type="RollingUpdate", rolling_update=apps.RollingUpdateDeploymentArgs(max_surge=1, max_unavailable=0)
            ),
            revision_history_limit=5,
            template=pod_template(
                args.scope,
                PodArgs(
                    component="router",
                    instance=NAME,
                    placement=args.placement,
                    containers=[envoy],
                    volumes=[read_only_config(config_name)],
                    grace_s=drain_s + MARGIN_S,
                    spread=True,
                ),
            ),
        )


def backend(service: Service, runtime: Runtime) -> Backend:
    """Where the ready replicas of `service` are, and what of them is shown."""
    return Backend(
        name=service.name,
        host=pods_service(service.name),
        port=runtime.port,
        ready=ready_path(service, runtime),
        paths=runtime.paths,
        lingers=runtime.lingers,
    )


def _await(expose: Literal["ClusterIP", "LoadBalancer"]) -> dict[str, str]:
    """A load balancer's address is an output worth a bounded wait; a cluster IP needs none."""
    return {"pulumi.com/timeoutSeconds": "300"} if expose == "LoadBalancer" else SKIP_AWAIT
