"""From logits to tokens, a whole batch at once. B rows to sample, V vocabulary.

Logits are first adjusted (penalties, biases, structure), where a row asks for it. Sampling inverts the
cumulative distribution at one uniform number a row. With top-k, top-p or min-p the tokens are first sorted by
probability: all then keep a beginning of the row, so the cut is a smaller total and nothing is renormalised.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from serving.engine.messages import TokenLogprob
from serving.engine.sequence import Sequence
from serving.engine.structure import mask

SMALLEST_TEMPERATURE = 1e-30  # what is smaller may be 0 in float32: it takes the likeliest all the same
FINITE = 1e30  # the largest logit that a penalty makes, so that differences of two are numbers


def sample(logits_BV: Tensor, seqs: Seq[Sequence]) -> list[int]:
    """The next token of each sequence. `temperature` 0 takes the most likely; each other row draws from its own rng."""
    logits_BV = _adjust(logits_BV, seqs)
    tokens = logits_BV.argmax(dim=-1)
    drawn = [row for row, seq in enumerate(seqs) if seq.params.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits_BV[drawn], [seqs[row] for row in drawn])
    return tokens.tolist()


def _adjust(logits_BV: Tensor, seqs: Seq[Sequence]) -> Tensor:
    """Logits after what a request adds to them. Rows that ask for nothing are not touched."""
    penalised = [row for row, seq in enumerate(seqs) if seq.penalised]
    biased = [row for row, seq in enumerate(seqs) if seq.params.logit_bias]
    structured = [row for row, seq in enumerate(seqs) if seq.matcher is not None]
    if not (penalised or biased or structured):
        return logits_BV
    logits_BV = logits_BV.clone()
    if penalised:
        logits_BV[penalised] = _penalise(logits_BV[penalised], [seqs[row] for row in penalised])
    if biased:
        at = [(row, token, bias) for row in biased for token, bias in seqs[row].params.logit_bias]
        rows, tokens, biases = zip(*at, strict=True)
        logits_BV.index_put_(
            (torch.tensor(rows, device=logits_BV.device), torch.tensor(tokens, device=logits_BV.device)),
            torch.tensor(biases, dtype=logits_BV.dtype, device=logits_BV.device), accumulate=True,
        )  # fmt: skip
    if structured:
        logits_BV[structured] = mask(logits_BV[structured], [m for row in structured if (m := seqs[row].matcher)])
    return logits_BV


def _penalise(logits_BV: Tensor, seqs: Seq[Sequence]) -> Tensor:
    def count(tokens_of_rows: list[list[int]]) -> Tensor:
        rows = torch.repeat_interleave(torch.tensor([len(tokens) for tokens in tokens_of_rows]))
        tokens = torch.tensor([token for tokens in tokens_of_rows for token in tokens], dtype=torch.int64)
        counts = torch.zeros(logits_BV.shape)
        return counts.index_put_((rows, tokens), torch.ones(len(tokens)), accumulate=True).to(logits_BV.device)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logits_BV.dtype, device=logits_BV.device)[:, None]

    in_answer = count([seq.token_ids[seq.num_prompt :] for seq in seqs])
    anywhere = in_answer + count([seq.token_ids[: seq.num_prompt] for seq in seqs]) > 0
    repetition = column([seq.params.repetition_penalty for seq in seqs])
    repeated = torch.where(logits_BV > 0, logits_BV / repetition, logits_BV * repetition).clamp(-FINITE, FINITE)
    logits_BV = torch.where(anywhere, repeated, logits_BV)
    frequency = column([seq.params.frequency_penalty for seq in seqs])
    presence = column([seq.params.presence_penalty for seq in seqs])
    return logits_BV - frequency * in_answer - presence * (in_answer > 0)


def _draw(logits_BV: Tensor, seqs: Seq[Sequence]) -> Tensor:
    device = logits_BV.device
    temperature = torch.tensor([max(seq.params.temperature, SMALLEST_TEMPERATURE) for seq in seqs], device=device)
    uniform = torch.tensor([seq.rng.random() for seq in seqs], dtype=torch.float64, device=device)
    # The largest logit is taken away before the division, which a tiny temperature would turn into inf − inf.
    shifted = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    probs = torch.softmax(shifted / temperature[:, None], dim=-1)
    cut = [row for row, seq in enumerate(seqs) if seq.cut]
    tokens = _invert(probs.cumsum(dim=-1, dtype=torch.float64), uniform)
    if cut:
        tokens[cut] = _draw_cut(probs[cut], uniform[cut], [seqs[row] for row in cut])
    return tokens


def _draw_cut(probs_BV: Tensor, uniform_B: Tensor, seqs: Seq[Sequence]) -> Tensor:
    """Draws within top-k, within the fewest most likely tokens whose probabilities reach top-p, and above min-p."""
    vocab = probs_BV.shape[-1]
    top_k = torch.tensor([seq.params.top_k or vocab for seq in seqs], device=probs_BV.device).clamp(max=vocab)
    top_p = torch.tensor([seq.params.top_p for seq in seqs], dtype=torch.float64, device=probs_BV.device)
    ordered, order = probs_BV.sort(dim=-1, descending=True, stable=True)
    mass = ordered.cumsum(dim=-1, dtype=torch.float64)
    # top-p is a share of what top-k left, and keeps at least the first token.
    total = mass.gather(1, top_k[:, None] - 1)
    kept = (mass - ordered < top_p[:, None] * total).sum(dim=-1).clamp(min=1).minimum(top_k)
    min_p = torch.tensor([seq.params.min_p for seq in seqs], dtype=probs_BV.dtype, device=probs_BV.device)
    kept = kept.minimum((ordered >= min_p[:, None] * ordered[:, :1]).sum(dim=-1)).clamp(min=1)
    positions = torch.arange(vocab, device=probs_BV.device)
    end = mass.gather(1, kept[:, None] - 1)
    drawn = _invert(torch.where(positions < kept[:, None], mass, end), uniform_B)
    return order.gather(1, drawn[:, None])[:, 0]


def _invert(mass_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds `uniform` of the total, so never one of probability 0.

    Where a model has overflowed and nothing is a number it is an index all the same, which harms no other row.
    """
    total = mass_BV[:, -1:]
    target = torch.minimum(uniform_B[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass_BV, target, right=True)[:, 0].clamp(max=mass_BV.shape[1] - 1)


def logprobs(logits_BV: Tensor, tokens: Seq[int], *, top: int, offsets: Seq[int]) -> list[TokenLogprob]:
    """The log-probability of each row's token under the model itself (before temperature and cuts), and of the
    `top` most likely ones."""
    table = torch.log_softmax(logits_BV, dim=-1)
    chosen = table.gather(1, torch.tensor(tokens, device=table.device)[:, None])[:, 0].tolist()
    best = torch.topk(table, min(top, table.shape[-1]), dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    tops = [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
    return [TokenLogprob(*row) for row in zip(tokens, chosen, tops, offsets, strict=True)]
