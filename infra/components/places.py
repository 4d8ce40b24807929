"""Where pods find what a stack names by path: a corpus, questions, a package. Each is mounted read-only; URLs need no mount."""

from collections.abc import Iterable
from dataclasses import dataclass

from pulumi_kubernetes.core import v1 as core

from infra.components.common import digest
from infra.spec import Located


@dataclass(frozen=True, kw_only=True)
class Place:
    """A volume of the namespace, or a path of the machine that runs all pods (`slipway local`)."""

    name: str
    """Of the pod's volume."""
    mount_path: str
    claim: str | None = None
    directory: str | None = None

    @property
    def mount(self) -> core.VolumeMountArgs:
        return core.VolumeMountArgs(name=self.name, mount_path=self.mount_path, read_only=True)

    @property
    def volume(self) -> core.VolumeArgs:
        if self.claim is None:
            assert self.directory is not None
            return core.VolumeArgs(name=self.name, host_path=core.HostPathVolumeSourceArgs(path=self.directory))
        claim = core.PersistentVolumeClaimVolumeSourceArgs(claim_name=self.claim)
        return core.VolumeArgs(name=self.name, persistent_volume_claim=claim)


def path_of(located: Located) -> str:
    """The path or URL by which the programs open it."""
    place = _place_of(located)
    if place is None:
        return located.path
    return f"{place.mount_path}/{located.path}" if place.claim else place.mount_path


def places_of(located: Iterable[Located]) -> tuple[Place, ...]:
    """What is to be mounted, each once, in order."""
    return tuple(dict.fromkeys(place for one in located if (place := _place_of(one))))


def _place_of(located: Located) -> Place | None:
    if located.volume_claim:
        name = located.volume_claim
        return Place(name=f"from-{name}", mount_path=f"/from/{name}", claim=name)
    if located.here:
        name = f"here-{digest(located.path)}"
        return Place(name=name, mount_path=f"/{name}", directory=str(located.here))
    return None
