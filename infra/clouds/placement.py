"""How pods find the nodes of a pool: node selector and tolerated taints, as plain values."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from infra.spec import NodePool, Stack

POOL_LABEL = "slipway.dev/pool"
# Two stacks of one cluster may both call a pool `train`: the namespace tells their nodes apart.
NAMESPACE_LABEL = "slipway.dev/namespace"


@dataclass(frozen=True, kw_only=True)
class Placement:
    node_selector: dict[str, str] = field(default_factory=dict[str, str])
    tolerated_pools: tuple[str, ...] = ()
    """Pools whose taint `slipway.dev/pool=NAME:NoSchedule` the pod tolerates."""
    avoid_label: str | None = None
    """Nodes without this label are preferred."""
    runtime_class: str | None = None
    """RuntimeClass by which containers get the node's GPUs."""


def on_pool(stack: Stack, pool: str) -> Placement:
    """Pods that need the nodes of `pool`. Nodes that Slipway does not make carry no labels of its: any will do."""
    runtime_class = stack.pool(pool).runtime_class
    if stack.platform.cloud == "local":
        return Placement(runtime_class=runtime_class)
    labels = {POOL_LABEL: pool, NAMESPACE_LABEL: stack.platform.namespace}
    return Placement(node_selector=labels, tolerated_pools=_tainted([stack.pool(pool)]), runtime_class=runtime_class)


def beside_pools(stack: Stack, pools: Iterable[str]) -> Placement:
    """Pods that need no GPU: on a general node where the cluster has one with room, else on a node of `pools`.

    The tolerations are what keeps such a pod from being Pending for ever in a cluster that has nodes of pools only.
    """
    if stack.platform.cloud == "local":
        return Placement()
    wanted = [stack.pool(name) for name in dict.fromkeys(pools)]
    return Placement(tolerated_pools=_tainted(wanted), avoid_label=POOL_LABEL)


def _tainted(pools: Iterable[NodePool]) -> tuple[str, ...]:
    return tuple(pool.name for pool in pools if pool.taint)
