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
