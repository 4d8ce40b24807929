"""Which adapters are in the engine's memory: read when the first sequence needs one, kept while there is room.

Bounded by number and by bytes. An adapter that admitted sequences use stays; of the others the one that was used least
of late makes room for the next. A sequence whose adapter has no place waits, as one does that has no blocks.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from serving.engine.messages import AdapterRef
from serving.engine.scheduler import Scheduled
from serving.errors import Refused
from serving.model.adapter import read_adapter
from serving.model.config import ModelConfig
from serving.model.llama import Llama
from serving.model.lora import Groups, Lora, attach, read_lora
from serving.model.shard import Shard


class HasAdapter(Protocol):
    """A sequence, or what another rank knows of one."""

    @property
    def adapter(self) -> AdapterRef | None: ...


class Adapting(Protocol):
    """A model's own side of it."""

    value_bytes: int

    def read(self, ref: AdapterRef) -> Lora:
        """The adapter in the model's form. Raises `Refused` when its files are not what they were."""
        ...

    def group(self, batch: Seq[Scheduled], loras: Mapping[AdapterRef, Lora]) -> None:
        """Tells the model's layers which rows of the step's batch are whose."""
        ...


class Adapters:
    def __init__(self, model: Adapting, *, max_count: int, max_bytes: int) -> None:
        self._model, self._max_count, self._max_bytes = model, max_count, max_bytes
        self._here: OrderedDict[AdapterRef, Lora] = OrderedDict()  # least recently used first
        self._users: Counter[AdapterRef] = Counter()  # admitted sequences
        self.loads = self.evictions = 0

    def fits(self, seq: HasAdapter) -> bool:
        """Whether the sequence's adapter is here, or there is room for it once those that nobody uses are gone."""
        ref = seq.adapter
        if ref is None or ref in self._here or not self._users:
            return True
        return len(self._users) < self._max_count and self._bytes([*self._users, ref]) <= self._max_bytes

    def acquire(self, seq: HasAdapter) -> None:
        """Keeps the adapter of a sequence that `fits` here until `release`. Raises `Refused`."""
        ref = seq.adapter
        if ref is None:
            return
        if ref not in self._here:
            if self._bytes([ref]) > self._max_bytes:
                what = f"the adapter takes {self._bytes([ref]):,} bytes and all may take {self._max_bytes:,}"
                raise Refused(what, where=str(ref.root), fix=f"Give --adapter-bytes {self._bytes([ref])} or more")
            idle = [other for other in self._here if other not in self._users]
            while len(self._here) >= self._max_count or self._bytes([*self._here, ref]) > self._max_bytes:
                del self._here[idle.pop(0)]
                self.evictions += 1
            self._here[ref] = self._model.read(ref)
            self.loads += 1
        self._here.move_to_end(ref)
        self._users[ref] += 1

    def release(self, seq: HasAdapter) -> None:
        if seq.adapter is not None:
            self._users[seq.adapter] -= 1
            if not self._users[seq.adapter]:
                del self._users[seq.adapter]

    def forget(self, ref: AdapterRef) -> None:
        """Gives back the memory of an adapter that is served no more; one in use goes when it is the oldest of the idle."""
        if ref not in self._users:
            self._here.pop(ref, None)

    def group(self, batch: Seq[Scheduled]) -> None:
        """Prepares a step. Everyone in the batch has been admitted, so that all of their adapters are here."""
        self._model.group(batch, self._here)

    def __len__(self) -> int:
        return len(self._here)

    def _bytes(self, refs: Iterable[AdapterRef]) -> int:
        return sum(ref.num_values for ref in refs) * self._model.value_bytes


class LlamaAdapting:
    def __init__(self, model: Llama, config: ModelConfig, *, device: torch.device, shard: Shard) -> None:
        """`model` may be one rank's share; `config` is the whole one's."""
        self.model, self.config, self.device, self.shard = model, config, device, shard
        self.value_bytes = model.compute_dtype.itemsize
        self._groups: Groups | None = None  # a model that has met no adapter has no places for any, and loses no time

    def read(self, ref: AdapterRef) -> Lora:
        file = read_adapter(ref.root, self.config)
        if file.digest != ref.digest:
            raise Refused("the adapter was changed on disk", where=str(ref.root), fix="Load it again")
        if self._groups is None:
            self._groups = attach(self.model)
        dtype = self.model.compute_dtype
        return read_lora(file, self.config, device=self.device, dtype=dtype, shard=self.shard)

    def group(self, batch: Seq[Scheduled], loras: Mapping[AdapterRef, Lora]) -> None:
        if self._groups is None:
            return
        rows: dict[AdapterRef | None, list[int]] = {}
        end = 0
        for item in batch:
            rows.setdefault(item.seq.adapter, []).extend(range(end, end + item.num_tokens))
            end += item.num_tokens
        self._groups.of_step = [(loras[ref], self._index(of, end)) for ref, of in rows.items() if ref is not None]

    def _index(self, rows: list[int], total: int) -> Tensor | None:
        return None if len(rows) == total else torch.tensor(rows, device=self.device)
