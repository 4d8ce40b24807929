"""Add-ons that stacks may need and that are brought when they are asked for: `slipway cluster up --with NAME`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from infra.clouds.local import golang
from infra.clouds.local.debian import Say


class AddOn(StrEnum):
    """Names that `--with` takes."""

    MONITORING = "monitoring"
    """Prometheus by its operator, which reads ServiceMonitor, PodMonitor and PrometheusRule."""


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


OPTIONS: Mapping[AddOn, Option] = {
    AddOn.MONITORING: Option(
        programs={
            "prometheus": ("prometheus", "prometheus"),
            "prometheus-operator": ("prometheus-operator", "operator"),
            "prometheus-config-reloader": ("prometheus-operator", "prometheus-config-reloader"),
        },
        kinds=_of_operator("probes", "prometheuses"),
    ),
}


def programs(cache: Path, names: Sequence[AddOn], *, say: Say) -> dict[str, Path]:
    """Image → program, of all the add-ons `names`, built where they are not. Raises `Unable`, `ClusterError`."""
    wanted = {image: of for name in names for image, of in OPTIONS[name].programs.items()}
    built = golang.build(cache, sorted({module for module, _ in wanted.values()}), say=say)
    return {image: built.folders[module] / program for image, (module, program) in wanted.items()}
