"""Where launches of a training meet that train apart (`local_sgd.launches`): one small pod that keeps their store, and a budget that
lets a node be drained of one launch at a time.

The store is in the pod's memory. When the pod goes, the launches fail, start again, and go on from their checkpoints.
"""

from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.apps import v1 as apps
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs
from pulumi_kubernetes.policy import v1 as policy

from infra.clouds import Placement
from infra.components.common import SKIP_AWAIT, Scope, component_selector, resources, selector
from infra.components.pods import PodArgs, container, pod_template
from infra.components.stage import Image
from infra.spec import PodResources

PORT = 29400
# Facts of a few bytes; torch itself takes the memory.
STORE = PodResources(cpus=0.1, memory_gib=0.5)
# Importing torch, on a busy node with a cold disk.
START_S = 120


@dataclass(frozen=True, kw_only=True)
class MeetingPlaceArgs:
    scope: Scope
    name: str
    """Of its objects; the launches' name with its digest, so that another training meets elsewhere."""
    image: Image
    placement: Placement
    launches: int
    nodes_of_launch: int


class MeetingPlace(pulumi.ComponentResource):
    endpoint: str
    """`host:port`, for MEETING_ENDPOINT."""

    def __init__(self, name: str, args: MeetingPlaceArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:MeetingPlace", name, None, opts)
        self.endpoint = f"{args.name}:{PORT}"
        labels, child = selector("meet", args.name), pulumi.ResourceOptions(parent=self)
        core.Service(
            f"{name}-service",
            metadata=args.scope.meta(args.name, component="meet", annotations=SKIP_AWAIT),
            spec=core.ServiceSpecArgs(
                selector=labels, ports=[core.ServicePortArgs(name="meeting", port=PORT, target_port="meeting")]
            ),
            opts=child,
        )
        apps.Deployment(
            f"{name}-deployment",
            metadata=args.scope.meta(args.name, component="meet", annotations=SKIP_AWAIT),
            spec=apps.DeploymentSpecArgs(
                replicas=1,
                selector=LabelSelectorArgs(match_labels=labels),
                # Two would be two places, and launches that never find one another.
                strategy=apps.DeploymentStrategyArgs(type="Recreate"),
                revision_history_limit=1,
                template=pod_template(args.scope, _pod(args)),
            ),
            opts=pulumi.ResourceOptions(parent=self, depends_on=args.image.needs),
        )
        policy.PodDisruptionBudget(
            f"{name}-budget",
            metadata=args.scope.meta(args.name, component="train"),
            spec=policy.PodDisruptionBudgetSpecArgs(
                # A number: of Jobs' pods nobody knows how many there should be, so that no share can be had of them.
                min_available=(args.launches - 1) * args.nodes_of_launch,
                selector=LabelSelectorArgs(match_labels=component_selector("train")),
                unhealthy_pod_eviction_policy="AlwaysAllow",
            ),
            opts=child,
        )
        self.register_outputs({"endpoint": self.endpoint})


def _pod(args: MeetingPlaceArgs) -> PodArgs:
    open_port = core.TCPSocketActionArgs(port="meeting")
    return PodArgs(
        component="meet",
        instance=args.name,
        placement=args.placement,
        containers=[
            container(
                name="meeting",
                image=args.image.reference,
                command=["python", "-m", "trainer.meeting", "--host", "0.0.0.0"],  # noqa: S104 - a pod's own network
                resources=resources(STORE, gpu_resource=args.scope.gpu_resource),
                ports={"meeting": PORT},
                startup=core.ProbeArgs(
                    tcp_socket=open_port, period_seconds=2, timeout_seconds=2, failure_threshold=START_S // 2
                ),
                readiness=core.ProbeArgs(tcp_socket=open_port, period_seconds=10, timeout_seconds=5),
            )
        ],
        # Karpenter leaves its node alone while the stack declares the training.
        annotations={"karpenter.sh/do-not-disrupt": "true"},
        grace_s=10,
    )
