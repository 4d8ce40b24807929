"""A pool of machines: Karpenter's objects on a cloud, and nothing at all where the nodes are there already."""

from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.apiextensions import CustomResource
from pulumi_kubernetes.apps import v1 as apps
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs, ObjectMetaArgs

from infra.catalog import Instance
from infra.clouds import Placement, karpenter
from infra.components.common import SKIP_AWAIT, Scope, resources, selector
from infra.components.pods import PodArgs, container, pod_template
from infra.components.stage import Image
from infra.spec import NodePool, Platform, PodResources

PAUSE = "registry.k8s.io/pause:3.10"
KEEPER = PodResources(cpus=0.01, memory_gib=1 / 64)
PULLER = PodResources(cpus=0.05, memory_gib=1 / 16)
"""For a Python that starts and ends."""


@dataclass(frozen=True, kw_only=True)
class GpuNodePoolArgs:
    scope: Scope
    platform: Platform
    pool: NodePool
    machine: Instance
    placement: Placement
    """Where pods of this pool go."""
    trains: bool
    """A training runs on it: its nodes are taken away only when they are empty."""
    images: tuple[Image, ...]
    """Images of what runs on it: kept nodes pull them before anyone waits for them."""


class GpuNodePool(pulumi.ComponentResource):
    """Raises ValueError for a cloud whose nodes Slipway does not make."""

    def __init__(self, name: str, args: GpuNodePoolArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:GpuNodePool", name, None, opts)
        cloud = args.platform.cloud
        if cloud == "aws":
            self._karpenter(name, args)
        elif cloud != "local":
            raise ValueError(
                f"platform.cloud: nodes of {cloud} are not made by this version; "
                "make the nodes with that cloud's own tools and set `cloud: local`, which takes nodes that are there"
            )
        self.register_outputs({})

    def _karpenter(self, name: str, args: GpuNodePoolArgs) -> None:
        platform, pool = args.platform, args.pool
        meta = ObjectMetaArgs(
            name=karpenter.object_name(pool, platform), labels=args.scope.labels("node-pool", pool.name)
        )
        node_class = CustomResource(
            f"{name}-class",
            api_version="karpenter.k8s.aws/v1",
            kind="EC2NodeClass",
            metadata=meta,
            spec=karpenter.node_class(pool, platform=platform),
            opts=pulumi.ResourceOptions(parent=self),
        )
        nodes = CustomResource(
            f"{name}-nodes",
            api_version="karpenter.sh/v1",
            kind="NodePool",
            metadata=meta,
            spec=karpenter.node_pool(pool, platform=platform, machine=args.machine, trains=args.trains),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[node_class]),
        )
        if pool.min_nodes:
            self._keeper(name, args, nodes)

    def _keeper(self, name: str, args: GpuNodePoolArgs, nodes: CustomResource) -> None:
        """`min_nodes` pods that ask for almost nothing, one a node: Karpenter keeps nodes for pods only.

        Its own `spec.replicas` is alpha, behind a feature gate, and cannot be mixed with scaling on demand. Placeholders that
        ask for whole nodes would be head-room above what runs, and not a least number of nodes.
        """
        keeper = f"keep-{args.pool.name}"
        asked = resources(KEEPER, gpu_resource=args.scope.gpu_resource)
        briefly = resources(PULLER, gpu_resource=args.scope.gpu_resource)
        apart = core.PodAffinityTermArgs(
            topology_key="kubernetes.io/hostname",
            label_selector=LabelSelectorArgs(match_labels=selector("keep", keeper)),
        )
        pod = PodArgs(
            component="keep",
            instance=keeper,
            placement=args.placement,
            affinity=core.AffinityArgs(
                pod_anti_affinity=core.PodAntiAffinityArgs(required_during_scheduling_ignored_during_execution=[apart])
            ),
            # Gigabytes, and minutes of a cold start: a node that is kept has them before a replica comes.
            init_containers=[
                container(name=f"pull-{index}", image=image.reference, command=["python", "-c", ""], resources=briefly)
                for index, image in enumerate(args.images)
            ],
            containers=[
                container(
                    name="pause",
                    image=PAUSE,
                    command=["/pause"],
                    resources=asked,
                )
            ],
            grace_s=0,
        )
        apps.Deployment(
            f"{name}-keeper",
            metadata=args.scope.meta(keeper, component="keep", annotations=SKIP_AWAIT),
            spec=apps.DeploymentSpecArgs(
                replicas=args.pool.min_nodes,
                selector=LabelSelectorArgs(match_labels=selector("keep", keeper)),
                template=pod_template(args.scope, pod),
            ),
            opts=pulumi.ResourceOptions(
                parent=self, depends_on=[nodes, *(build for image in args.images for build in image.needs)]
            ),
        )
