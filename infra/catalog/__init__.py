"""Dated, sourced facts: GPUs, instance types, prices. TOML beside this file; an unknown name is an error, never a default.

`$SLIPWAY_CATALOG` may name a TOML file of the user's, with the same tables (`[gpu.NAME]`, `[instance.NAME]`, `[model.NAME]`), whose entries
are added to these and replace those of the same name.
"""

import os
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from infra.spec.stack import unknown

HERE = Path(__file__).parent


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
    gflops_per_cpu: float = 25.0
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
    if extra := os.environ.get("SLIPWAY_CATALOG"):
        users = tomllib.loads(Path(extra).read_text())
        gpus |= users.get("gpu", {})
        priced |= users.get("instance", {})
    return (
        {name: Gpu(name=name, **entry) for name, entry in gpus.items()},
        {name: Instance(name=name, **entry) for name, entry in priced.items()},
    )


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
    if extra := os.environ.get("SLIPWAY_CATALOG"):
        known |= tomllib.loads(Path(extra).read_text()).get("model", {})
    return known


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
