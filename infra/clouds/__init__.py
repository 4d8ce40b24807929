"""What a node pool becomes on each cloud, and how pods find it."""

from infra.clouds.placement import NAMESPACE_LABEL, POOL_LABEL, Placement, beside_pools, on_pool

__all__ = ["NAMESPACE_LABEL", "POOL_LABEL", "Placement", "beside_pools", "on_pool"]
