"""Where models are kept: a volume of the namespace, or an object store; and the volumes of datasets and runs."""

from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.core import v1 as core

from infra.components.common import SKIP_AWAIT, Scope
from infra.components.pods import Claim
from infra.spec import Registry, Storage

MOUNT_PATH = "/registry"


@dataclass(frozen=True, kw_only=True)
class RegistryAccess:
    """How a pod reaches the registry: its fsspec URL, and the claim to mount for it, if it is a volume."""

    url: str
    claims: tuple[Claim, ...]

    def channel(self, model: str, channel: str) -> str:
        """URL of the file that points at the model which `channel` serves."""
        return f"{self.url.rstrip('/')}/models/{model}/channels/{channel}.json"

    def entry(self, model: str, digest: str) -> str:
        """URL of one immutable entry."""
        return f"{self.url.rstrip('/')}/models/{model}/{digest}"


@dataclass(frozen=True, kw_only=True)
class ModelRegistryArgs:
    scope: Scope
    registry: Registry
    storage: Storage
    trains: bool
    """The stack trains, and needs volumes for datasets and runs."""


class ModelRegistry(pulumi.ComponentResource):
    def __init__(self, name: str, args: ModelRegistryArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:ModelRegistry", name, None, opts)
        if args.registry.url is None:
            self._claim(name, "registry", args.registry.size_gib, args)
        if args.trains:
            self._claim(name, "data", args.storage.data_gib, args)
            self._claim(name, "runs", args.storage.runs_gib, args)
        self.register_outputs({"url": access(args.registry, writes=True).url})

    def _claim(self, name: str, claim: str, size_gib: int, args: ModelRegistryArgs) -> None:
        """A volume that many nodes can write where the class gives it, else one node."""
        core.PersistentVolumeClaim(
            f"{name}-{claim}",
            # Many classes bind a volume when its first pod is scheduled: nothing to wait for here.
            metadata=args.scope.meta(claim, component="storage", annotations=SKIP_AWAIT),
            spec=core.PersistentVolumeClaimSpecArgs(
                access_modes=["ReadWriteMany" if args.storage.shared else "ReadWriteOnce"],
                storage_class_name=args.storage.class_name,
                resources=core.VolumeResourceRequirementsArgs(requests={"storage": f"{size_gib}Gi"}),
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )


def access(registry: Registry, *, writes: bool) -> RegistryAccess:
    """How pods reach `registry`; servers mount a volume read-only."""
    if registry.url is not None:
        return RegistryAccess(url=registry.url, claims=())
    claim = Claim(claim="registry", mount_path=MOUNT_PATH, read_only=not writes)
    return RegistryAccess(url=f"file://{MOUNT_PATH}", claims=(claim,))


def is_remote(url: str | None) -> bool:
    """Whether `url` (None: a volume) is reached over the network."""
    return url is not None and "://" in url and not url.startswith("file://")
