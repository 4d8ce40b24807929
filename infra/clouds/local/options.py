"""Add-ons that stacks may need and that are brought when they are asked for: `slipway cluster up --with NAME`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from infra.clouds.local import golang
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

    programs: Mapping[str, tuple[str, str]]
    """Image → the Go module of tools/ whose program it runs, and the program."""
    kinds: Kinds
    needs: tuple[AddOn, ...] = ()


OPTIONS: Mapping[AddOn, Option] = {
    AddOn.MONITORING: Option(
        programs={
            "prometheus": ("prometheus", "prometheus"),
            "prometheus-operator": ("prometheus-operator", "operator"),
            "prometheus-config-reloader": ("prometheus-operator", "prometheus-config-reloader"),
        },
        kinds=_of_operator("probes", "prometheuses"),
    ),
    AddOn.KEDA: Option(
        programs={"keda-operator": ("keda", "operator"), "keda-metrics-apiserver": ("keda", "adapter")},
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
    """Image → program, of all the add-ons `names`, built where they are not. Raises `Unable`, `ClusterError`."""
    wanted = {image: of for name in names for image, of in OPTIONS[name].programs.items()}
    built = golang.build(cache, sorted({module for module, _ in wanted.values()}), say=say)
    return {image: built.folders[module] / program for image, (module, program) in wanted.items()}
