"""SLW6xx: what is open, unpinned or without an identity. All of it works; none of it is meant."""

from collections.abc import Iterator

from infra.checks.finding import Finding
from infra.planner import Plan
from infra.spec import Stack

SCHEMES = {"aws": "s3://", "gcp": "gs://", "azure": "abfs://"}
"""Object stores that a workload identity of the cloud opens."""


def network_is_closed(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW601: without network policies every pod of the cluster may call the servers, past the router."""
    if not stack.tenancy.network_policies:
        yield Finding(
            code="SLW601",
            severity="warn",
            where="tenancy.network_policies",
            message="any pod of the cluster may reach servers, routers and ranks",
            fix="network_policies: true, or SLW601: off where another tool denies by default",
            patch={"tenancy.network_policies": True},
        )


def endpoint_asks_for_keys(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW604: a load balancer before a service that asks nobody for an API key: whoever finds it uses its GPUs."""
    if stack.router.expose != "LoadBalancer" or stack.platform.cloud == "local":
        return
    for service in stack.services:
        if service.api_keys_secret is None:
            asks = "api_keys" in stack.runtime(service).placeholders
            yield Finding(
                code="SLW604",
                severity="warn",
                where=f"services.{service.name}.api_keys_secret",
                message="the router has a load balancer, and the service asks nobody for an API key",
                fix=(
                    "api_keys_secret: NAME of a Secret with keys.json"
                    if asks
                    else "a gateway that asks before the router"
                )
                + ", expose: ClusterIP for the router, or SLW604: off where a gateway asks",
                patch={"router.expose": "ClusterIP"},
            )


def admin_is_closed(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW605: with API keys the metrics are at the admin port, which asks for none: without network policies any pod may drain it."""
    for service in stack.services:
        if service.api_keys_secret and not stack.tenancy.network_policies:
            yield Finding(
                code="SLW605",
                severity="error",
                where="tenancy.network_policies",
                message=f"the admin port of {service.name} is for Prometheus, and any pod of the cluster may reach it",
                fix="network_policies: true, or SLW605: warn where another tool denies by default",
                patch={"tenancy.network_policies": True},
            )


def images_are_pinned(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW602: an image called `latest` is another one after each push: a restarted pod is not the pod that was tested."""
    images = stack.images
    used = {"base": images.base, "router": images.router}
    if images.registry is None:
        # Built images carry the digest of their content; so does a prebuilt reference without a tag.
        used |= {"trainer": images.trainer, "serving": images.serving}
    for key, reference in used.items():
        tag = "" if "@sha256:" in reference else reference.rsplit("/", 1)[-1].partition(":")[2] or "latest"
        untagged_gets_digest = key in ("trainer", "serving") and ":" not in reference.rsplit("/", 1)[-1]
        if tag == "latest" and not untagged_gets_digest:
            yield Finding(
                code="SLW602",
                severity="warn",
                where=f"images.{key}",
                message=f"{reference} is whatever was pushed last",
                fix="name a version or a digest",
            )


def stores_can_be_opened(stack: Stack, _: Plan) -> Iterator[Finding]:
    """SLW603: an object store without an identity for the pods that open it; nodes' credentials are closed to pods."""
    url = stack.registry.url or ""
    if url.startswith(SCHEMES.get(stack.platform.cloud, "\0")) and not stack.registry.identity:
        yield Finding(
            code="SLW603",
            severity="warn",
            where="registry.identity",
            message=f"{url} is opened by pods without an identity, and the node's credentials are out of their reach",
            fix="annotations of a role that may open it, or SLW603: off where an association outside the stack gives one",
        )
