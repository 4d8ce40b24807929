"""Decode steps as CUDA graphs: one launch in the place of hundreds, for batches filled up to a power of two.

Comes with `--attention flash`, and like it never ran on a GPU in the project's own tests (see attention_flash.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from serving.engine.attention import Plan
from serving.engine.attention_flash import FlashPool, FlashStep
from serving.model.llama import Llama


class Graph(NamedTuple):
    ids: Tensor
    cos: Tensor
    sin: Tensor
    step: FlashStep
    replay: Callable[[], Tensor]


def cuda_graph(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`compute` as a graph. What it reads stays where it is; its result is overwritten by the next replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # once outside of the graph: what is set up at the first use may not be captured
        compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class DecodeGraphs:
    """A model whose decode steps are replayed, and whose other steps are computed as ever."""

    def __init__(
        self, model: Llama, pool: FlashPool, *, max_num_seqs: int, max_model_len: int,
        capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] = cuda_graph,
    ) -> None:  # fmt: skip
        self.config, self.compute_dtype, self.logits = model.config, model.compute_dtype, model.logits
        self._model, self._pool, self._capture = model, pool, capture
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self._graphs: dict[int, Graph] = {}  # by the sequences that each has room for

    def __call__(self, ids_N: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, attend: Plan) -> Tensor:
        assert isinstance(attend, FlashStep)
        if not attend.is_plain_decode:
            return self._model(ids_N, cos_N1D, sin_N1D, attend)
        count = len(ids_N)
        room = min(1 << (count - 1).bit_length(), self._max_num_seqs)
        graph = self._graphs.get(room) or self._make(room, cos_N1D)
        graph.ids.zero_()[:count].copy_(ids_N)
        graph.cos[:count].copy_(cos_N1D)
        graph.sin[:count].copy_(sin_N1D)
        graph.step.take_over(attend)
        return graph.replay()[:count]

    def _make(self, room: int, like_N1D: Tensor) -> Graph:
        ids = torch.zeros(room, dtype=torch.int64, device=self._pool.device)
        cos, sin = (like_N1D.new_zeros(room, *like_N1D.shape[1:]) for _ in range(2))
        step = FlashStep.idle(self._pool, sequences=room, max_model_len=self._max_model_len)
        replay = self._capture(lambda: self._model(ids, cos, sin, step))
        self._graphs[room] = Graph(ids, cos, sin, step, replay)
        return self._graphs[room]
