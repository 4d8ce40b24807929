"""One answer in the making: its tokens, how many of them are in the cache, and the blocks that hold those."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from serving.engine.messages import AdapterRef, SamplingParams, TokenLogprob
from serving.text_stream import TextStream

if TYPE_CHECKING:
    from serving.engine.structure import Matcher


class Sequence:
    def __init__(
        self,
        seq_id: int,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        decode: Callable[[list[int]], str],
        arrived_s: float,
        priority: int = 0,
        tenant: str = "",
        adapter: AdapterRef | None = None,
    ) -> None:
        assert prompt_ids, "an empty prompt has no last token to predict from"
        self.seq_id = seq_id
        self.params = params
        self.token_ids = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.num_computed = 0  # tokens whose keys and values are in the cache
        self.block_table: list[int] = []
        self.num_published = 0  # of its full blocks, those that other sequences can find
        self.block_hashes: list[bytes] = []  # of its full blocks, chained; grows as tokens are computed
        self.arrived_s = arrived_s
        self.queue_s: float | None = None
        self.cached_tokens = 0  # of its prompt, those found in the cache when it was first let in
        self.cumulative_logprob = 0.0
        self.matcher: Matcher | None = None
        self.adapter = adapter
        self.priority, self.tenant = priority, tenant
        self.text = TextStream(decode, params.stop)
        # One stream of chance for each sequence, advanced once a token: whatever else is in the batch, and however
        # often the sequence is preempted, the same seed draws the same numbers.
        self.rng = random.Random(params.seed)  # noqa: S311
        self.pending_logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = [None]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def penalised(self) -> bool:
        p = self.params
        return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0)

    @property
    def cut(self) -> bool:
        p = self.params
        return p.top_p < 1.0 or p.top_k > 0 or p.min_p > 0.0

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed
