"""A node pool on EKS: Karpenter's NodePool and EC2NodeClass (https://karpenter.sh/docs/concepts/nodepools/), as plain dicts."""

from typing import Any

from infra.catalog import Instance
from infra.clouds.placement import NAMESPACE_LABEL, POOL_LABEL
from infra.spec import NodePool, Platform

Json = dict[str, Any]


def node_pool(pool: NodePool, *, platform: Platform, machine: Instance, trains: bool) -> Json:
    """`spec` of the NodePool. Raises ValueError for an order of capacity that Karpenter cannot keep."""
    if pool.capacity[0] == "on-demand" and "spot" in pool.capacity:
        raise ValueError(
            f"node_pools.{pool.name}.capacity: Karpenter takes spot first wherever it may; "
            "write [spot, on-demand], or [on-demand] alone"
        )
    requirements = [
        _one_of("node.kubernetes.io/instance-type", [pool.instance]),
        _one_of("karpenter.sh/capacity-type", list(pool.capacity)),
        _one_of("kubernetes.io/arch", ["amd64"]),
    ]
    if pool.zones:
        requirements.append(_one_of("topology.kubernetes.io/zone", list(pool.zones)))
    template: Json = {
        "nodeClassRef": {"group": "karpenter.k8s.aws", "kind": "EC2NodeClass", "name": object_name(pool, platform)},
        "requirements": requirements,
        # Training must not lose its node to age; a server's pods move, one node at a time.
        "expireAfter": "Never" if trains else "720h",
    }
    if pool.taint:
        template["taints"] = [{"key": POOL_LABEL, "value": pool.name, "effect": "NoSchedule"}]
    labels = {POOL_LABEL: pool.name, NAMESPACE_LABEL: platform.namespace}
    return {
        "template": {"metadata": {"labels": labels}, "spec": template},
        "disruption": _disruption(trains=trains),
        "limits": _limits(pool, machine=machine, gpu_resource=platform.gpu_resource),
    }


def node_class(pool: NodePool, *, platform: Platform) -> Json:
    """`spec` of the EC2NodeClass: subnets and security groups by the cluster's discovery tag, encrypted disk, IMDSv2 only."""
    discovery = [{"tags": {"karpenter.sh/discovery": platform.cluster}}]
    disk = {"volumeSize": f"{pool.disk_gib}Gi", "volumeType": "gp3", "encrypted": True, "deleteOnTermination": True}
    return {
        "amiSelectorTerms": [{"alias": platform.node_image}],
        # The role that Karpenter's own installation guide makes.
        "role": f"KarpenterNodeRole-{platform.cluster}",
        "subnetSelectorTerms": discovery,
        "securityGroupSelectorTerms": discovery,
        "blockDeviceMappings": [{"deviceName": "/dev/xvda", "rootVolume": True, "ebs": disk}],
        # Local NVMe, where the type has it, holds images and scratch space.
        "instanceStorePolicy": "RAID0",
        # One hop: pods cannot reach the node's credentials.
        "metadataOptions": {"httpTokens": "required", "httpPutResponseHopLimit": 1},
        "tags": {POOL_LABEL: pool.name, NAMESPACE_LABEL: platform.namespace},
    }


def object_name(pool: NodePool, platform: Platform) -> str:
    """Name of the NodePool and the EC2NodeClass, which belong to the cluster and not to a namespace."""
    return f"{platform.namespace}-{pool.name}"


def _one_of(key: str, values: list[str]) -> Json:
    return {"key": key, "operator": "In", "values": values}


def _limits(pool: NodePool, *, machine: Instance, gpu_resource: str) -> Json:
    """`max_nodes` in what Karpenter counts: all nodes are of one type, so GPUs (or CPUs) count nodes exactly."""
    if machine.gpus:
        return {gpu_resource: str(pool.max_nodes * machine.gpus)}
    return {"cpu": str(int(pool.max_nodes * machine.cpus))}


def _disruption(*, trains: bool) -> Json:
    """Training nodes go only when they are empty; a gang's restart waits ten minutes for its nodes to be still there."""
    if trains:
        return {
            "consolidationPolicy": "WhenEmpty",
            "consolidateAfter": "10m",
            "budgets": [{"nodes": "100%", "reasons": ["Empty"]}, _none_else()],
        }
    return {"consolidationPolicy": "WhenEmptyOrUnderutilized", "consolidateAfter": "5m", "budgets": [{"nodes": "1"}]}


def _none_else() -> Json:
    return {"nodes": "0", "reasons": ["Drifted", "Underutilized"]}
