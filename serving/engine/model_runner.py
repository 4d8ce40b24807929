"""Runs one step's batch through the model: lays tokens out flat, and samples where a sequence is complete."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
import torch.nn.functional as F

from serving.engine.attention import Pool
from serving.engine.messages import TokenLogprob
from serving.engine.sampler import logprobs, sample
from serving.engine.scheduler import Scheduled
from serving.model.llama import Llama, rope_table


class Sampled(NamedTuple):
    token_id: int | None  # None: the sequence's prompt is not computed to its end yet
    logprob: TokenLogprob | None = None
    embedding: tuple[float, ...] | None = None


class ModelRunner:
    def __init__(self, model: Llama, pool: Pool, *, max_model_len: int) -> None:
        self.model, self.pool = model, pool
        cos, sin = rope_table(model.config, positions=max_model_len)
        self.cos, self.sin = cos.to(pool.device, model.compute_dtype), sin.to(pool.device, model.compute_dtype)

    @torch.inference_mode()
    def run(self, batch: Seq[Scheduled]) -> list[Sampled]:
        """Computes the batch and returns each sequence's next token. Decodes (one token) must come first, longest first.

        Fills `prompt_logprobs` of the sequences that ask for them.
        """
        attend = self.pool.plan(batch)
        ids = [token for seq, n in batch for token in seq.token_ids[seq.num_computed : seq.num_computed + n]]
        positions = torch.from_numpy(attend.positions).to(self.pool.device)
        ids_N = torch.tensor(ids, device=self.pool.device)
        x_NE = self.model(ids_N, self.cos[positions], self.sin[positions], attend)
        self._report_prompts(batch, x_NE)
        return self._sample(batch, x_NE)

    def _sample(self, batch: Seq[Scheduled], x_NE: torch.Tensor) -> list[Sampled]:
        results = [Sampled(None)] * len(batch)
        rows, at, end = [], [], 0
        for index, item in enumerate(batch):
            end += item.num_tokens
            if item.completes:
                rows.append(end - 1)
                at.append(index)
        if not rows:
            return results
        seqs = [batch[index].seq for index in at]
        logits_BV = self.model.logits(x_NE if len(rows) == len(x_NE) else x_NE[rows])
        tokens = sample(logits_BV, seqs)
        for index, token in zip(at, tokens, strict=True):
            results[index] = Sampled(token)
        for index, row in zip(at, rows, strict=True):
            if batch[index].seq.params.embed:  # the last token's state has seen the whole prompt
                results[index] = Sampled(0, embedding=tuple(F.normalize(x_NE[row].float(), dim=0).tolist()))
        asked = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
        if asked:
            top = max(seqs[row].params.logprobs or 0 for row in asked)
            offsets = [seqs[row].text.position for row in asked]
            found = logprobs(logits_BV[asked], [tokens[row] for row in asked], top=top, offsets=offsets)
            for row, entry in zip(asked, found, strict=True):
                entry = entry._replace(top=entry.top[: seqs[row].params.logprobs or 0])
                results[at[row]] = Sampled(tokens[row], entry)
        return results

    def _report_prompts(self, batch: Seq[Scheduled], x_NE: torch.Tensor) -> None:
        """Logprobs of prompt tokens, each predicted by the position before it (the first by nothing)."""
        end = 0
        for seq, num_tokens in batch:
            start, end = end, end + num_tokens
            first = seq.num_computed + 1
            targets = seq.token_ids[first : min(first + num_tokens, seq.num_prompt)]
            # After a preemption the prompt is computed again; what was reported is not reported twice.
            if not seq.params.prompt_logprobs or not targets or len(seq.prompt_logprobs) >= first + len(targets):
                continue
            logits = self.model.logits(x_NE[start : start + len(targets)])
            entries = logprobs(logits, targets, top=seq.params.logprobs or 0, offsets=[0] * len(targets))
            seq.prompt_logprobs[first:] = entries
