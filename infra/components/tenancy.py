"""The namespace of a stack: Pod Security `restricted`, quota, defaults for containers, ServiceAccounts without tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import ObjectMetaArgs

from infra.components.common import Scope, cpu_quantity, memory_quantity
from infra.spec import Quota
from infra.spec import Tenancy as TenancySpec

LEVELS = ("enforce", "audit", "warn")


@dataclass(frozen=True, kw_only=True)
class TenancyArgs:
    name: str
    tenancy: TenancySpec
    gpu_resource: str
    gpus: int
    """GPUs that all pools can hold: the quota, where the stack sets none."""
    accounts: Mapping[str, Mapping[str, str]]
    """ServiceAccount → annotations (its identity at the cloud)."""
    pull_secret: str | None


class Tenancy(pulumi.ComponentResource):
    """`name` is the namespace's, as an Output that everything inside it depends on."""

    name: pulumi.Output[str]

    def __init__(self, name: str, args: TenancyArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:Tenancy", name, None, opts)
        team = args.tenancy.team
        security = {f"pod-security.kubernetes.io/{level}": "restricted" for level in LEVELS}
        labels = Scope(namespace="", team=team, gpu_resource="").labels("tenancy", args.name)
        namespace = core.Namespace(
            f"{name}-namespace",
            metadata=ObjectMetaArgs(name=args.name, labels=labels | security),
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.name = namespace.metadata.apply(lambda metadata: metadata.name or args.name)
        self.scope = Scope(namespace=self.name, team=team, gpu_resource=args.gpu_resource, pull_secret=args.pull_secret)
        self._quota(name, args)
        self._defaults(name)
        for account, annotations in args.accounts.items():
            core.ServiceAccount(
                f"{name}-{account}",
                metadata=self.scope.meta(account, component=account, annotations=annotations),
                # Nothing in this stack talks to the Kubernetes API.
                automount_service_account_token=False,
                opts=pulumi.ResourceOptions(parent=self),
            )
        self.register_outputs({"name": self.name})

    def _quota(self, name: str, args: TenancyArgs) -> None:
        core.ResourceQuota(
            f"{name}-quota",
            metadata=self.scope.meta("quota", component="tenancy", annotations={"pulumi.com/skipAwait": "true"}),
            spec=core.ResourceQuotaSpecArgs(
                hard=_hard(args.tenancy.quota, gpus=args.gpus, gpu_resource=args.gpu_resource)
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _defaults(self, name: str) -> None:
        """What a container gets that asks for nothing, such as a debug container: small, and never unlimited."""
        core.LimitRange(
            f"{name}-defaults",
            metadata=self.scope.meta("defaults", component="tenancy"),
            spec=core.LimitRangeSpecArgs(
                limits=[
                    core.LimitRangeItemArgs(
                        type="Container",
                        default_request={"cpu": "100m", "memory": "128Mi"},
                        default={"cpu": "1", "memory": "1Gi"},
                    )
                ]
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )


def _hard(quota: Quota, *, gpus: int, gpu_resource: str) -> dict[str, str]:
    hard = {"pods": str(quota.pods), f"requests.{gpu_resource}": str(gpus if quota.gpus is None else quota.gpus)}
    if quota.cpus is not None:
        hard["requests.cpu"] = cpu_quantity(quota.cpus)
    if quota.memory_gib is not None:
        hard["requests.memory"] = memory_quantity(quota.memory_gib)
    return hard
