"""The batch of any step, from nothing but the step: the place in the data is exact after every resume, at any world size."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.dataset import Dataset, TokenStream
from trainer.data.windows import Batch, PackedExamples, StreamWindows, Windows
from trainer.errors import Refused

_BLOCK = 1024  # samples in which every source has its exact share


class _Epochs:
    """Sample number n of one source: every window once an epoch, in an order of the epoch's own."""

    def __init__(self, windows: Windows, *, seed: list[int]) -> None:
        self.windows, self._seed = windows, seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def window(self, sample: int) -> int:
        epoch, index = divmod(sample, len(self.windows))
        if epoch != self._epoch:
            first, *more = self._seed
            self._order = self.windows.order(np.random.default_rng([first, epoch, *more]))
            self._epoch = epoch
        return int(self._order[index])


class Cursor:
    """Draws the samples of every step. They are numbered before they are dealt to ranks.

    Of several sources each block of 1024 samples has every source's share of them, in an order of the block's own, so
    that the weights hold from the beginning and sample n is found without those before it.
    """

    def __init__(self, sources: Sequence[tuple[Windows, float]], *, global_batch: int, seed: int) -> None:
        self._global_batch, self._seed = global_batch, seed
        # The first source's randomness does not know of the others.
        self._sources = [
            _Epochs(windows, seed=[seed, *([number] if number else [])]) for number, (windows, _) in enumerate(sources)
        ]
        self._shares = _shares([weight for _, weight in sources])
        self._block = -1
        self.shortened = sum(windows.cut for windows, _ in sources if isinstance(windows, PackedExamples))
        """Examples that are longer than a window."""
        self.left_out = sum(windows.left_out for windows, _ in sources if isinstance(windows, PackedExamples))
        """Those among them that have nothing left to learn."""
        self.wait_s = 0.0
        """Time spent in `batch` so far."""

    @classmethod
    def over(cls, stream: TokenStream, *, seq: int, global_batch: int, seed: int) -> "Cursor":
        """Over one stream of tokens."""
        return cls([(StreamWindows(stream, seq=seq), 1.0)], global_batch=global_batch, seed=seed)

    @classmethod
    def of(cls, dataset: Dataset, *, seq: int, global_batch: int, seed: int, document_mask: bool = False) -> "Cursor":
        """Over the training split of a dataset, with the weights of its sources."""
        windows: list[Windows] = []
        for number, source in enumerate(dataset.manifest.sources):
            size: dict[str, Any] = {"seq": seq, "source": source.name}
            if dataset.task == "text":
                end = dataset.end_of_text if document_mask else None
                windows.append(StreamWindows(dataset.tokens("train", source=number), end_of_text=end, **size))
            else:
                examples = dataset.examples("train", source=number)
                windows.append(PackedExamples(examples, keep_end=dataset.task == "classify", **size))
        return cls(list(zip(windows, dataset.weights, strict=True)), global_batch=global_batch, seed=seed)

    def samples(self, step: int) -> list[tuple[int, int]]:
        """(source, window) of the samples of a step, `global_batch` of them."""
        first = step * self._global_batch
        return [self._sample(number) for number in range(first, first + self._global_batch)]

    def _sample(self, number: int) -> tuple[int, int]:
        if len(self._sources) == 1:
            return 0, self._sources[0].window(number)
        block, place = divmod(number, _BLOCK)
        if block != self._block:
            dealt = np.repeat(np.arange(len(self._shares)), self._shares)
            self._dealt = np.random.default_rng([self._seed, block, len(self._shares)]).permutation(dealt)
            self._block = block
        source = int(self._dealt[place])
        before = int((self._dealt[:place] == source).sum())
        return source, self._sources[source].window(block * int(self._shares[source]) + before)

    def batch(self, step: int, *, micro: int, micro_batch: int, rank: int, world: int) -> Batch:
        """Micro-batch number `micro` of data-parallel rank `rank` of `world`."""
        begun_s = time.perf_counter()
        first = (micro * world + rank) * micro_batch
        chosen = self.samples(step)[first : first + micro_batch]
        batch = Batch.of([self._sources[source].windows.read(window) for source, window in chosen])
        self.wait_s += time.perf_counter() - begun_s
        return batch


def _shares(weights: list[float]) -> np.ndarray:
    """Samples of each source in a block, (sources,): the weights to a thousandth, by largest remainders."""
    exact = np.array(weights) / sum(weights) * _BLOCK
    shares = np.floor(exact).astype(np.int64)
    for source in np.argsort(shares - exact, kind="stable")[: _BLOCK - int(shares.sum())]:
        shares[source] += 1
    if (shares == 0).any():
        source = int(np.argmin(shares))
        what = f"weight {weights[source]:g} of mixture number {source + 1} is less than one sample in {_BLOCK}"
        raise Refused(what, where="mixture", fix="Raise it or remove the source.")
    return shares
