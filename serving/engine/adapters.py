"""Which adapters are in the engine's memory: read when the first sequence needs one, kept while there is room.

Reading is a thread's work, so that no step waits for a disk: between steps what has come is taken in. Bounded by number
and by bytes. An adapter that admitted sequences use stays, and one that is being read has its place; of the others the
one that was used least of late makes room for the next. A sequence whose adapter is not here waits, and is passed by.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from serving.engine.background import in_background
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
        """The adapter in the model's form; called by a thread. Raises `Refused` when its files are not what they were."""
        ...

    def attach(self) -> None:
        """Makes places for adapters in the model's layers; called between steps, and once is enough."""
        ...

    def group(self, batch: Seq[Scheduled], loras: Mapping[AdapterRef, Lora]) -> None:
        """Tells the model's layers which rows of the step's batch are whose."""
        ...


class Adapters:
    def __init__(self, model: Adapting, *, max_count: int, max_bytes: int) -> None:
        self._model, self._max_count, self._max_bytes = model, max_count, max_bytes
        self._here: OrderedDict[AdapterRef, Lora] = OrderedDict()  # least recently used first
        self._coming: dict[AdapterRef, Future[Lora]] = {}
        self._failed: dict[AdapterRef, BaseException] = {}  # of those that came to nothing, why
        self._users: Counter[AdapterRef] = Counter()  # admitted sequences
        self.loads = self.evictions = 0

    def here(self, seq: HasAdapter) -> bool:
        """Whether `acquire` has an answer at once."""
        self._take_in()
        ref = seq.adapter
        return ref is None or ref in self._here or ref in self._failed or self._bytes([ref]) > self._max_bytes

    def bring(self, seq: HasAdapter) -> None:
        """Begins to read the sequence's adapter, if that is to be done and there is a place for it."""
        ref = seq.adapter
        if ref is not None and not self.here(seq) and ref not in self._coming and self._make_room(ref):
            self._coming[ref] = in_background(partial(self._model.read, ref))

    def held_up(self, seq: HasAdapter) -> bool:
        """Whether there will be no place for the sequence's adapter until sequences that run have ended."""
        ref = seq.adapter
        if ref is None or ref in self._here or ref in self._coming:
            return False
        return not self._fit([*self._users, ref])

    def acquire(self, seq: HasAdapter) -> None:
        """Keeps the sequence's adapter here until `release`; where it is not `here`, waits for it. Raises `Refused`."""
        ref = seq.adapter
        if ref is None:
            return
        if self._bytes([ref]) > self._max_bytes:
            what = f"the adapter takes {self._bytes([ref]):,} bytes and all may take {self._max_bytes:,}"
            raise Refused(what, where=str(ref.root), fix=f"Give --adapter-bytes {self._bytes([ref])} or more")
        self.bring(seq)
        while not self.here(seq):
            assert self._coming, "those who share a step have places together"
            wait(self._coming.values(), return_when=FIRST_COMPLETED)
        if ref in self._failed:
            raise self._failed.pop(ref)  # the next who asks for it has it read again
        self._here.move_to_end(ref)
        self._users[ref] += 1

    @property
    def coming(self) -> list[Future[Lora]]:
        """Those that are being read."""
        return [*self._coming.values()]

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

    def _take_in(self) -> None:
        for ref, future in [*self._coming.items()]:
            if not future.done():
                continue
            del self._coming[ref]
            error = future.exception()
            if error is not None:
                self._failed[ref] = error
                continue
            self._model.attach()
            self._here[ref] = future.result()
            self.loads += 1

    def _make_room(self, ref: AdapterRef) -> bool:
        if not self._fit([*self._users, *self._coming, ref]):
            return False
        idle = [other for other in self._here if other not in self._users]
        while not self._fit([*self._here, *self._coming, ref]):
            del self._here[idle.pop(0)]
            self.evictions += 1
        return True

    def _fit(self, refs: Seq[AdapterRef]) -> bool:
        return len(refs) <= self._max_count and self._bytes(refs) <= self._max_bytes

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
        dtype = self.model.compute_dtype
        try:
            return read_lora(file, self.config, device=self.device, dtype=dtype, shard=self.shard)
        except (OSError, SafetensorError) as error:
            raise Refused(f"the adapter cannot be read: {error}", where=str(file.path), fix="Load it again") from None

    def attach(self) -> None:
        if self._groups is None:
            self._groups = attach(self.model)

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
