"""Adapters in a running model: each row of a batch gets what its own adapter adds, and rows of one adapter go together.

Shapes: M rows of a batch, K inputs, N outputs, R the ranks of all of a layer's matrices together.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from serving.errors import Refused
from serving.model.adapter import AdapterFile, shapes
from serving.model.config import ModelConfig
from serving.model.llama import Llama
from serving.model.shard import AXIS, COLUMNS, Shard, Summed

# Our layer → the checkpoint's matrices that it holds, one below the other.
PARTS = {
    "attention.qkv": ("q_proj", "k_proj", "v_proj"), "attention.out": ("o_proj",),
    "ffn.gate_up": ("gate_proj", "up_proj"), "ffn.down": ("down_proj",),
}  # fmt: skip


class Part(NamedTuple):
    """What one of a layer's matrices gets: columns [start, stop) of its output, from ranks [low, high)."""

    start: int
    stop: int
    low: int
    high: int
    b_NR: Tensor  # with the scale in it


class Delta(NamedTuple):
    """What an adapter adds to one layer. The first products of its matrices are one product, since they read one input."""

    a_RK: Tensor
    parts: tuple[Part, ...]

    def add(self, y_MN: Tensor, x_MK: Tensor, rows: Tensor | None) -> None:
        """Adds to all rows, or to those that `rows` names."""
        h_MR = F.linear(x_MK if rows is None else x_MK[rows], self.a_RK)
        for part in self.parts:
            columns = y_MN[:, part.start : part.stop]
            if rows is None:
                columns.addmm_(h_MR[:, part.low : part.high], part.b_NR.T)
            else:
                columns.index_add_(0, rows, F.linear(h_MR[:, part.low : part.high], part.b_NR))


class Lora:
    """One adapter's matrices, by the name of the layer that they change."""

    def __init__(self, deltas: dict[str, Delta]) -> None:
        self.deltas = deltas


class Groups:
    """Which rows of the step's batch are whose: read by every layer, set once a step."""

    def __init__(self) -> None:
        self.of_step: Seq[tuple[Lora, Tensor | None]] = ()


class LoraLinear(nn.Module):
    """A layer of any kind (plain, packed, quantised, a rank's share), and what adapters add to its output."""

    def __init__(self, base: nn.Module, name: str, groups: Groups) -> None:
        super().__init__()
        self.base, self.name, self.groups = base, name, groups

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for lora, rows in self.groups.of_step:
            delta = lora.deltas.get(self.name)
            if delta is not None:
                delta.add(y, x, rows)
        return y


def attach(model: Llama) -> Groups:
    """Puts adapters' places into `model`, and returns the groups that they listen to."""
    groups = Groups()
    for index, block in enumerate(model.blocks):
        for place in PARTS:
            parent, _, child = place.partition(".")
            owner = getattr(block, parent)
            if isinstance(getattr(owner, child), Summed):  # a rank adds its share before the ranks add theirs up
                owner, child = getattr(owner, child), "base"
            setattr(owner, child, LoraLinear(getattr(owner, child), f"{index}.{place}", groups))
    return groups


def read_lora(
    file: AdapterFile, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, shard: Shard
) -> Lora:
    """The adapter's matrices, or one rank's share of them, on `device`. `config` is the whole model's. Raises `Refused`."""
    by_place = {(target.layer, target.module): target for target in file.targets}
    deltas: dict[str, Delta] = {}
    with safe_open(file.path, framework="pt") as tensors:
        for layer in range(config.layers):
            for place, modules in PARTS.items():
                a, parts, start, low = [], [], 0, 0
                split_inputs = AXIS[place] == COLUMNS
                for module in modules:
                    outputs, inputs = shapes(config)[module]
                    target = by_place.get((layer, module))
                    (first, last) = shard.span(inputs if split_inputs else outputs)
                    stop = start + (outputs if split_inputs else last - first)
                    if target is not None:
                        a_RK = tensors.get_tensor(f"{target.key}.lora_A.weight").float()
                        b_NR = tensors.get_tensor(f"{target.key}.lora_B.weight").float() * target.scale
                        if not (a_RK.isfinite().all() and b_NR.isfinite().all()):
                            what = f"'{target.key}' holds values that are no numbers"
                            raise Refused(what, where=str(file.path), fix="Save the adapter again, or an earlier one")
                        a.append(a_RK[:, first:last] if split_inputs else a_RK)
                        b_NR = b_NR if split_inputs else b_NR[first:last]
                        parts.append(Part(start, stop, low, low + target.rank, b_NR.to(device, dtype)))
                        low += target.rank
                    start = stop
                if parts:
                    deltas[f"{layer}.{place}"] = Delta(torch.cat(a).to(device, dtype), tuple(parts))
    return Lora(deltas)
