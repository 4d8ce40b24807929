"""Add-ons that stacks may need and that are brought when they are asked for: `slipway cluster up --with NAME`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from infra.clouds.local import debian, golang
from infra.clouds.local.debian import Say


class AddOn(StrEnum):
    """Names that `--with` takes."""

    MONITORING = "monitoring"
    """Prometheus by its operator, which reads ServiceMonitor, PodMonitor and PrometheusRule."""
    KEDA = "keda"
    """KEDA, which reads ScaledObject; and Prometheus, which it asks."""


OPERATOR = "github.com/prometheus-operator/prometheus-operator"


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """Files of a Go module that define kinds of objects."""

    tool: str
    """Folder of tools/ whose go.mod says which version of the module."""
    module: str
    files: tuple[str, ...]
    """Patterns of their paths."""


def _of_operator(*kinds: str) -> Kinds:
    files = tuple(f"example/prometheus-operator-crd/monitoring.coreos.com_{kind}.yaml" for kind in kinds)
    return Kinds(tool="prometheus-operator", module=OPERATOR, files=files)


MONITORS = _of_operator("podmonitors", "servicemonitors", "prometheusrules")
"""What manifests of stacks have, whether or not somebody reads it."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """An add-on: the programs that it runs, the kinds that it brings, and `addons/NAME.yaml`, which says how."""

    module: str
    """Folder of tools/: the Go module that its programs are built from."""
    programs: Mapping[str, str]
    """Image → program of that module."""
    packages: Mapping[str, str] = field(default_factory=dict[str, str])
    """Image, and the Debian package and program that are called so."""
    kinds: Kinds
    needs: tuple[AddOn, ...] = ()


OPTIONS: Mapping[AddOn, Option] = {
    AddOn.MONITORING: Option(
        module="prometheus-operator",
        programs={"prometheus-operator": "operator", "prometheus-config-reloader": "prometheus-config-reloader"},
        packages={"prometheus": "prometheus"},
        kinds=_of_operator("probes", "prometheuses"),
    ),
    AddOn.KEDA: Option(
        module="keda",
        programs={"keda-operator": "operator", "keda-metrics-apiserver": "adapter"},
        kinds=Kinds(tool="keda", module="github.com/kedacore/keda/v2", files=("config/crd/bases/*.yaml",)),
        needs=(AddOn.MONITORING,),
    ),
}


def with_needs(names: Iterable[AddOn]) -> tuple[AddOn, ...]:
    """`names` and what they need, each before what needs it."""
    found: list[AddOn] = []
    for name in names:
        found += [one for one in (*with_needs(OPTIONS[name].needs), name) if one not in found]
    return tuple(found)


def programs(cache: Path, names: Sequence[AddOn], *, say: Say) -> dict[str, Path]:
    """Image → program, of all the options `names`: built or unpacked. Raises `Unable`, `ClusterError`."""
    chosen = [OPTIONS[name] for name in names]
    built = golang.build(cache, [option.module for option in chosen], say=say)
    found = {
        image: built.folders[option.module] / program for option in chosen for image, program in option.programs.items()
    }
    for option in chosen:
        for image, package in option.packages.items():
            # Unpacked even where it is installed: an image is made of the package as it is.
            unpacked = debian.programs(cache, {}, files=[package], say=say)
            found[image] = unpacked.file(f"usr/bin/{package}")
    return found
