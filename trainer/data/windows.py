"""What one sample is: a window of a stream of tokens, or examples packed into one row, each a world of its own."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from trainer.data.dataset import Examples, TokenStream
from trainer.data.encode import NOTHING
from trainer.errors import Refused

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """B samples of L positions, int64."""

    tokens_BL: np.ndarray
    targets_BL: np.ndarray  # the next token or the class; -100 where nothing is to be learnt
    documents_BL: np.ndarray | None  # the number of the document of each position; None: all may look back at all

    @classmethod
    def of(cls, samples: "list[Sample]") -> "Batch":
        tokens, targets, documents = zip(*samples, strict=True)
        masked = documents[0] is not None
        return cls(np.stack(tokens), np.stack(targets), np.stack(documents) if masked else None)  # pyright: ignore[reportArgumentType]

    def tensors(self, device: "torch.device") -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]":
        """Tokens, targets and documents on the device; a GPU copies them while it computes."""
        import torch  # here alone: the processes that make a dataset start faster without

        arrays = (self.tokens_BL, self.targets_BL, self.documents_BL)
        on_cpu = [None if array is None else torch.from_numpy(array) for array in arrays]
        if device.type == "cuda":
            on_cpu = [None if each is None else each.pin_memory() for each in on_cpu]
        tokens, targets, documents = (None if each is None else each.to(device, non_blocking=True) for each in on_cpu)
        assert tokens is not None
        assert targets is not None
        return tokens, targets, documents


Sample = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Tokens, targets and documents, each (L,)."""


class Windows(Protocol):
    """The samples of one source: `order` numbers those of an epoch, and `read` gets one by its number."""

    def __len__(self) -> int: ...

    def order(self, random: np.random.Generator) -> np.ndarray: ...

    def read(self, window: int) -> Sample: ...


class StreamWindows:
    """Windows of `seq` + 1 tokens, each of which shares one with the next.

    Every epoch cuts the stream from an offset of its own, so that a window's number is where it begins. With
    `end_of_text` the documents of a window are told apart by it.
    """

    def __init__(
        self, stream: TokenStream, *, seq: int, end_of_text: int | None = None, source: str = "source"
    ) -> None:
        self._stream, self._seq, self._end = stream, seq, end_of_text
        self._windows = (len(stream) - seq) // seq  # one is lost to the offset
        if self._windows < 1:
            fix = f"Give it more text, or set seq to at most {max((len(stream) - 1) // 2, 2)}."
            what = f"the {len(stream)} training tokens of {source} are too few for seq {seq}"
            raise Refused(what, where="seq", fix=fix)

    def __len__(self) -> int:
        return self._windows

    def order(self, random: np.random.Generator) -> np.ndarray:
        offset = int(random.integers(self._seq))
        return offset + random.permutation(self._windows) * self._seq

    def read(self, window: int) -> Sample:
        tokens = self._stream.read(window, self._seq + 1)
        documents = None
        if self._end is not None:
            ends = tokens[:-1] == self._end  # the end belongs to the document that it ends
            documents = np.cumsum(ends) - ends
        return tokens[:-1], tokens[1:], documents


class PackedExamples:
    """Rows of `seq` positions with as many whole examples as fit; no example sees another, and the rest is empty.

    Of an example that is too long a chat keeps its beginning and a text with a class its end. One that has nothing left
    to learn then is left out: `cut` and `left_out` count them.
    """

    def __init__(self, examples: Examples, *, seq: int, keep_end: bool, source: str = "source") -> None:
        self._examples, self._seq = examples, seq
        lengths = examples.lengths()
        self._starts = np.maximum(lengths - seq, 0) if keep_end else np.zeros_like(lengths)
        self._lengths = np.minimum(lengths, seq)
        useful = np.array([self._has_target(number) for number in range(len(examples))], dtype=bool)
        self.cut, self.left_out = int((lengths > seq).sum()), int((~useful).sum())
        self._rows = pack(self._lengths, np.flatnonzero(useful), room=seq)
        if not self._rows:
            what = f"no example of {source} has anything to learn within seq {seq}"
            raise Refused(what, where="seq", fix="Raise seq.")

    def _has_target(self, number: int) -> bool:
        _, targets = self._examples.read(number, int(self._starts[number]), int(self._lengths[number]))
        return bool((targets != NOTHING).any())

    def __len__(self) -> int:
        return len(self._rows)

    def order(self, random: np.random.Generator) -> np.ndarray:
        return random.permutation(len(self._rows))

    def read(self, window: int) -> Sample:
        tokens, documents = np.zeros(self._seq, dtype=np.int64), np.full(self._seq, -1)
        targets, at = np.full(self._seq, NOTHING), 0
        for place, number in enumerate(self._rows[window]):
            end = at + int(self._lengths[number])
            part = self._examples.read(number, int(self._starts[number]), end - at)
            tokens[at:end], targets[at:end] = part
            documents[at:end] = place
            at = end
        return tokens, targets, documents


def pack(lengths: np.ndarray, numbers: np.ndarray, *, room: int) -> list[list[int]]:
    """Best fit, longest first: the given numbers in rows whose lengths add up to at most `room`."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for number in sorted(map(int, numbers), key=lambda number: (-lengths[number], number)):
        length = int(lengths[number])
        at = bisect_left(free, (length, -1))
        if at < len(free):
            left, row = free.pop(at)
            rows[row].append(number)
        else:
            left, row = room, len(rows)
            rows.append([number])
        insort(free, (left - length, row))
    return rows
