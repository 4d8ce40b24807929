"""Runs one step's batch through the model: lays tokens out flat, and samples where a sequence is complete."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
import torch.nn.functional as F

from serving.engine.attention import Pool
from serving.engine.graphs import DecodeGraphs
from serving.engine.messages import TokenLogprob
from serving.engine.sampler import logprobs, sample
from serving.engine.scheduler import Scheduled
from serving.engine.sequence import Sequence
from serving.model.llama import Llama
from serving.model.rope import rope_table


class Sampled(NamedTuple):
    token_id: int
    logprob: TokenLogprob | None = None
    embedding: tuple[float, ...] | None = None


class ModelRunner:
    def __init__(self, model: Llama | DecodeGraphs, pool: Pool, *, max_model_len: int) -> None:
        self.model, self.pool = model, pool
        cos, sin = rope_table(model.config, positions=max_model_len)
        self.cos, self.sin = cos.to(pool.device, model.compute_dtype), sin.to(pool.device, model.compute_dtype)

    @torch.inference_mode()
    def run(self, batch: Seq[Scheduled]) -> list[list[Sampled]]:
        """Computes the batch and returns each sequence's next tokens: none, one, or one more than guesses came true.

        Decodes (one token) must come first, longest first.

        Fills `prompt_logprobs` of the sequences that ask for them.
        """
        attend = self.pool.plan(batch)
        ids = [token for item in batch for token in item.token_ids]
        positions = torch.from_numpy(attend.positions).to(self.pool.device)
        ids_N = torch.tensor(ids, device=self.pool.device)
        x_NE = self.model(ids_N, self.cos[positions], self.sin[positions], attend)
        self._report_prompts(batch, x_NE)
        return self._sample(batch, x_NE)

    def _sample(self, batch: Seq[Scheduled], x_NE: torch.Tensor) -> list[list[Sampled]]:
        rows, at, end = [], [], 0
        for index, item in enumerate(batch):
            end += item.num_tokens
            if item.completes:
                positions = 1 + len(item.guess)
                rows += range(end - positions, end)
                at += [index] * positions
        results: list[list[Sampled]] = [[] for _ in batch]
        if not rows:
            return results
        seqs = [batch[index].seq for index in at]
        logits_BV = self.model.logits(x_NE if len(rows) == len(x_NE) else x_NE[rows])
        chances = {item.seq.seq_id: item.seq.rng.getstate() for item in batch if item.guess}
        tokens = sample(logits_BV, seqs)
        reports = self._logprobs(logits_BV, tokens, seqs)
        for index, row, token, report in zip(at, rows, tokens, reports, strict=True):
            found, guess = results[index], batch[index].guess
            if all(sampled.token_id == guessed for sampled, guessed in zip(found, guess, strict=False)):
                found.append(Sampled(token, report, self._embedding(batch[index].seq, x_NE[row])))
        for item, found in zip(batch, results, strict=True):
            if item.guess and item.seq.params.temperature > 0:  # numbers drawn for guesses that failed were not used
                item.seq.rng.setstate(chances[item.seq.seq_id])
                for _ in found:
                    item.seq.rng.random()
        return results

    def _embedding(self, seq: Sequence, x_E: torch.Tensor) -> tuple[float, ...] | None:
        """The last token's state, which has seen the whole prompt, at unit length."""
        return tuple(F.normalize(x_E.float(), dim=0).tolist()) if seq.params.embed else None

    def _logprobs(self, logits_BV: torch.Tensor, tokens: list[int], seqs: list[Sequence]) -> list[TokenLogprob | None]:
        """For the rows that ask for them. Offsets are the place of the row's first token in the text."""
        reports: list[TokenLogprob | None] = [None] * len(seqs)
        asked = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
        if asked:
            top = max(seqs[row].params.logprobs or 0 for row in asked)
            offsets = [seqs[row].text.position for row in asked]
            found = logprobs(logits_BV[asked], [tokens[row] for row in asked], top=top, offsets=offsets)
            for row, entry in zip(asked, found, strict=True):
                reports[row] = entry._replace(top=entry.top[: seqs[row].params.logprobs or 0])
        return reports

    def _report_prompts(self, batch: Seq[Scheduled], x_NE: torch.Tensor) -> None:
        """Logprobs of prompt tokens, each predicted by the position before it (the first by nothing)."""
        end = 0
        for seq, num_tokens, _ in batch:
            start, end = end, end + num_tokens
            first = seq.num_computed + 1
            targets = seq.token_ids[first : min(first + num_tokens, seq.num_prompt)]
            # After a preemption the prompt is computed again; what was reported is not reported twice.
            if not seq.params.prompt_logprobs or not targets or len(seq.prompt_logprobs) >= first + len(targets):
                continue
            logits = self.model.logits(x_NE[start : start + len(targets)])
            entries = logprobs(logits, targets, top=seq.params.logprobs or 0, offsets=[0] * len(targets))
            seq.prompt_logprobs[first:] = entries
