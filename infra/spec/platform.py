"""Where a stack runs: cloud, namespace, images, node pools, volumes, registry, tenancy."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infra.spec.base import MOST_NODES, Misplaced, Name, NonNegativeInt, PositiveFloat, PositiveInt, Spec

Cloud = Literal["local", "aws", "gcp", "azure"]
Capacity = Literal["on-demand", "spot"]


class Platform(Spec):
    cloud: Cloud
    """`local` for one machine or any cluster whose nodes are there already; else the cloud whose nodes are made."""
    namespace: Name = "slipway"
    """Namespace of everything that this stack makes."""
    region: str | None = None
    """Region of the cloud, for prices and node pools: `us-east-1`."""
    cluster: Name | None = None
    """Name of the Kubernetes cluster; Karpenter discovers subnets and security groups by it."""
    gpu_resource: str = "nvidia.com/gpu"
    """Extended resource that a pod asks for to get a GPU."""
    node_image: str = "al2023@latest"
    """AMI alias of the nodes that Karpenter makes; a dated one (`al2023@vYYYYMMDD`) holds new images back until it is changed."""

    @model_validator(mode="after")
    def _cloud_needs_a_place(self) -> Self:
        if self.cloud != "local" and (self.region is None or self.cluster is None):
            raise Misplaced(f"cloud {self.cloud!r} needs `region` and `cluster`", "cloud")
        return self


class Images(Spec):
    registry: str | None = None
    """Repository prefix to build and push to, as `ghcr.io/acme`; the tag is the digest of the content. null: use the references below."""
    trainer: str = "slipway-trainer"
    """Prebuilt reference of the trainer's image, for when `registry` is not set. Without a tag it gets the content's digest."""
    serving: str = "slipway-serving"
    """Prebuilt reference of the server's image, for when `registry` is not set. Without a tag it gets the content's digest."""
    router: str = "docker.io/envoyproxy/envoy:distroless-v1.37.0"
    """Envoy's image."""
    base: str = "docker.io/library/python:3.11-slim-bookworm"
    """Base image of trainer and serving (a build argument)."""
    pull_secret: Name | None = None
    """Name of a Secret of type `kubernetes.io/dockerconfigjson` in the namespace."""


class NodePool(Spec):
    name: Name
    """Name that training and services refer to."""
    instance: str
    """Instance type of the catalogue: `p5.48xlarge`; `cpu` for machines without a GPU in a local stack. `auto`: the cheapest of
    the platform's cloud that trains within `training.deadline_h`, or serves `traffic` within `slo`."""
    min_nodes: Annotated[int, Field(ge=0, le=MOST_NODES)] = 0
    """Nodes that are kept when nothing runs."""
    max_nodes: Annotated[int, Field(ge=1, le=MOST_NODES)] = 1
    """Nodes that the pool can ever hold: what the checks count against."""
    capacity: tuple[Capacity, ...] = Field(default=("on-demand",), min_length=1)
    """Kinds of capacity, in order of preference; spot is interrupted."""
    zones: tuple[str, ...] = ()
    """Availability zones; empty for all of the region's."""
    disk_gib: PositiveInt = 500
    """Root volume of a node."""
    runtime_class: Name | None = None
    """RuntimeClass of pods that use its GPUs, where the cluster has one (`nvidia`); null: the nodes' default runtime has GPUs."""
    taint: bool = True
    """Keep out what does not ask for this pool (pods of this stack tolerate it by themselves)."""

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.min_nodes > self.max_nodes:
            raise Misplaced(f"{self.min_nodes} is above max_nodes {self.max_nodes}", "min_nodes")
        return self


class Storage(Spec):
    class_name: str | None = None
    """StorageClass of the volumes; null for the cluster's default."""
    shared: bool = False
    """True where the class gives ReadWriteMany volumes: needed once pods of several nodes share a volume."""
    data_gib: PositiveInt = 10
    """Volume of prepared datasets."""
    runs_gib: PositiveInt = 50
    """Volume of runs: checkpoints, logs, packages."""


class Registry(Spec):
    url: str | None = None
    """fsspec URL of an object store: `s3://acme-models`. null: a volume in the namespace."""
    size_gib: PositiveInt = 50
    """Size of that volume."""
    identity: dict[str, str] = Field(default={})
    """Annotations of the ServiceAccounts that may reach the object store, as `eks.amazonaws.com/role-arn: …`."""

    @model_validator(mode="after")
    def _is_a_url(self) -> Self:
        if self.url is not None and "://" not in self.url.strip("/"):
            raise Misplaced(f"{self.url!r} is no URL of an object store; leave it out for a volume", "url")
        return self


class Quota(Spec):
    gpus: NonNegativeInt | None = None
    """GPUs that the namespace may ask for at most; null: what the stack's pools can hold."""
    cpus: PositiveFloat | None = None
    """CPUs requested at most; null: no limit."""
    memory_gib: PositiveFloat | None = None
    """Memory requested at most, GiB; null: no limit."""
    pods: PositiveInt = 200
    """Pods at most."""


class Tenancy(Spec):
    team: Name = "ml"
    """Label `slipway.dev/team` on everything, for cost reports."""
    quota: Quota = Quota()
    """ResourceQuota of the namespace."""
    network_policies: bool = True
    """Deny all traffic but the flows that the stack needs."""
    ingress_from_namespaces: tuple[str, ...] = ()
    """Namespaces whose pods may call the router, besides this one."""
    monitoring_namespace: str = "monitoring"
    """Namespace whose pods may scrape metrics."""
