"""Dated, sourced facts: GPUs, instance types, prices. TOML beside this file; an unknown name is an error, never a default.

`$SLIPWAY_CATALOG` may name a TOML file of the user's, with the same tables (`[gpu.NAME]`, `[instance.NAME]`, `[model.NAME]`), whose entries
are added to these and replace those of the same name.
"""

import os
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from infra.spec.stack import unknown

HERE = Path(__file__).parent
T = TypeVar("T")
OR_NONE = ("gpus", "efa", "price", "interruptions_per_h")
"""Amounts that may be 0."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    tflops_bf16: float
    """Dense bf16 TFLOP/s (fp16 on T4)."""
    memory_gb: float
    """Nominal memory, 10^9 bytes."""
    memory_gib: float
    """Memory that a program can use, 2^30 bytes."""
    bandwidth_gbps: float
    """Memory bandwidth, GB/s."""
    intra_gbps: float
    """Bandwidth one way between GPUs of a node, GB/s."""
    tflops_fp8: float | None = None
    """Dense fp8 TFLOP/s; None: the GPU computes in bf16 whatever the weights are."""
    tdp_w: float = 400.0
    """Board power, watts."""
    nic_gbps: float = 12.5
    """Bandwidth one way to other nodes for each GPU, GB/s, where no instance says otherwise."""
    architecture: str = "ampere"
    """What the kernels' efficiency goes by."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    name: str
    cloud: str
    gpu: str | None = None
    gpus: int
    cpus: float
    memory_gib: float
    network_gbps: float
    """Gb/s of the node."""
    efa: int = 0
    """EFA interfaces (AWS)."""
    gflops_per_cpu: float = 40.0
    """fp32 GFLOP/s that this trainer reaches on one core, for pools without a GPU."""
    price: float | None = None
    """USD an hour on demand; None: not known."""
    spot_share: float = 0.45
    """Price of spot capacity over on demand."""
    interruptions_per_h: float = 0.001
    """Interruptions of one spot node in an hour."""
    spot_source: str = "an assumption"
    price_source: str = "the user's catalogue"
    price_date: str = "undated"

    # What kubelet, system daemons and eviction leave of a node. p5.48xlarge: 191450m of 192 CPUs and 1938410 of 2097152 MiB
    # (a node's reported allocatable); the shares are kept for the other types. A local machine is given as what it has to spare.
    @property
    def allocatable_cpus(self) -> float:
        return self.cpus if self.cloud == "local" else self.cpus * 191.45 / 192

    @property
    def allocatable_gib(self) -> float:
        return self.memory_gib if self.cloud == "local" else self.memory_gib * 1938410 / 2097152


@cache
def _tables() -> tuple[dict[str, Gpu], dict[str, Instance]]:
    gpus: dict[str, Any] = tomllib.loads((HERE / "gpus.toml").read_text())
    file: dict[str, Any] = tomllib.loads((HERE / "instances.toml").read_text())
    priced = {
        name: entry
        | {
            "price_source": file["prices"].get(entry["cloud"], {}).get("source", "unknown"),
            "price_date": file["prices"].get(entry["cloud"], {}).get("date", "unknown"),
        }
        | file["spot"].get(entry["cloud"], {})
        for name, entry in file["instance"].items()
    }
    gpus |= _users("gpu")
    priced |= _users("instance")
    return (
        {name: _entry(Gpu, "gpu", name, entry) for name, entry in gpus.items()},
        {name: _entry(Instance, "instance", name, entry) for name, entry in priced.items()},
    )


def _users(table: str) -> dict[str, Any]:
    """The user's own entries of a table. Raises ValueError for a file that is none."""
    path = os.environ.get("SLIPWAY_CATALOG")
    if not path:
        return {}
    try:
        entries: Any = tomllib.loads(Path(path).read_text(encoding="utf-8")).get(table, {})
    except OSError as error:
        raise ValueError(f"the catalogue cannot be read: {error.strerror} ({path}). Mend SLIPWAY_CATALOG") from None
    except ValueError as error:
        raise ValueError(f"the catalogue is no TOML: {error} ({path}). Mend it, or unset SLIPWAY_CATALOG") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in cast("Any", entries).values()):
        raise ValueError(f"[{table}] must hold tables, as [{table}.NAME] ({path}). Mend it, or unset SLIPWAY_CATALOG")
    return cast("dict[str, Any]", entries)


def _entry(made: Callable[..., T], table: str, name: str, entry: dict[str, Any]) -> T:
    """One row; a user's may have keys too many or too few."""
    wanted = {field.name: field for field in fields(cast("Any", made)) if field.name != "name"}
    wrong = [key for key in entry if key not in wanted]
    wrong += [key for key, field in wanted.items() if key not in entry and field.default is MISSING]
    wrong += [key for key in entry if key in wanted and not _suits(key, entry[key], str(wanted[key].type))]
    if wrong:
        fix = f"its keys are {', '.join(wanted)}"
        raise ValueError(f"[{table}.{name}] of the catalogue has no right `{wrong[0]}`; {fix}")
    return made(name=name, **entry)


def _suits(key: str, value: Any, annotation: str) -> bool:
    """Text where text is wanted, else a number above zero, or at zero where that says that there is none."""
    if "str" in annotation:
        return isinstance(value, str)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value < float("inf") or (value == 0 and key in OR_NONE)


def gpus() -> dict[str, Gpu]:
    """All GPUs by name."""
    return _tables()[0]


def instances() -> dict[str, Instance]:
    """All instance types by name."""
    return _tables()[1]


@cache
def models() -> dict[str, dict[str, Any]]:
    """Shapes of well-known decoders by name, as their Hugging Face config.json has them (models.toml, and `[model.NAME]` tables of
    the user's catalogue)."""
    known: dict[str, Any] = tomllib.loads((HERE / "models.toml").read_text())
    return known | _users("model")


def model(name: str) -> dict[str, Any]:
    """The shape of the model called `name`. Raises ValueError with the nearest names."""
    if name not in models():
        raise ValueError(unknown("model", name, models()))
    return models()[name]


def gpu(name: str) -> Gpu:
    """The GPU called `name`. Raises ValueError with the nearest names."""
    if name not in gpus():
        raise ValueError(unknown("GPU", name, gpus()))
    return gpus()[name]


def instance(name: str) -> Instance:
    """The instance type called `name`. Raises ValueError with the nearest names."""
    if name not in instances():
        raise ValueError(unknown("instance type", name, instances()))
    return instances()[name]
