"""From logits to tokens, a whole batch at once. B rows to sample, V vocabulary.

Sampling inverts the cumulative distribution at one uniform number a row. With top-k or top-p the tokens are first
sorted by probability: both then keep a beginning of the row, so the cut is a smaller total and nothing is renormalised.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from serving.engine.messages import TokenLogprob
from serving.engine.sequence import Sequence


def sample(logits_BV: Tensor, seqs: Seq[Sequence]) -> list[int]:
    """The next token of each sequence. `temperature` 0 takes the most likely; each other row draws from its own rng."""
    tokens = logits_BV.argmax(dim=-1)
    drawn = [row for row, seq in enumerate(seqs) if seq.params.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits_BV[drawn], [seqs[row] for row in drawn])
    return tokens.tolist()


def _draw(logits_BV: Tensor, seqs: Seq[Sequence]) -> Tensor:
    device = logits_BV.device
    temperature = torch.tensor([seq.params.temperature for seq in seqs], device=device)
    uniform = torch.tensor([seq.rng.random() for seq in seqs], dtype=torch.float64, device=device)
    # The largest logit is taken away before the division, which a tiny temperature would turn into inf − inf.
    shifted = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    probs = torch.softmax(shifted / temperature[:, None], dim=-1)
    cut = [row for row, seq in enumerate(seqs) if seq.params.top_p < 1.0 or seq.params.top_k > 0]
    tokens = _invert(probs.cumsum(dim=-1, dtype=torch.float64), uniform)
    if cut:
        tokens[cut] = _draw_cut(probs[cut], uniform[cut], [seqs[row] for row in cut])
    return tokens


def _draw_cut(probs_BV: Tensor, uniform_B: Tensor, seqs: Seq[Sequence]) -> Tensor:
    """Draws within top-k, and within the fewest most likely tokens whose probabilities reach top-p."""
    vocab = probs_BV.shape[-1]
    top_k = torch.tensor([seq.params.top_k or vocab for seq in seqs], device=probs_BV.device).clamp(max=vocab)
    top_p = torch.tensor([seq.params.top_p for seq in seqs], dtype=torch.float64, device=probs_BV.device)
    ordered, order = probs_BV.sort(dim=-1, descending=True, stable=True)
    mass = ordered.cumsum(dim=-1, dtype=torch.float64)
    # top-p is a share of what top-k left, and keeps at least the first token.
    total = mass.gather(1, top_k[:, None] - 1)
    kept = (mass - ordered < top_p[:, None] * total).sum(dim=-1).clamp(min=1).minimum(top_k)
    positions = torch.arange(vocab, device=probs_BV.device)
    end = mass.gather(1, kept[:, None] - 1)
    drawn = _invert(torch.where(positions < kept[:, None], mass, end), uniform_B)
    return order.gather(1, drawn[:, None])[:, 0]


def _invert(mass_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds `uniform` of the total, so never one of probability 0."""
    total = mass_BV[:, -1:]
    target = torch.minimum(uniform_B[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass_BV, target, right=True)[:, 0]


def logprobs(logits_BV: Tensor, tokens: Seq[int], *, top: int, offsets: Seq[int]) -> list[TokenLogprob]:
    """The log-probability of each row's token under the model itself (before temperature and cuts), and of the
    `top` most likely ones."""
    table = torch.log_softmax(logits_BV, dim=-1)
    chosen = table.gather(1, torch.tensor(tokens, device=table.device)[:, None])[:, 0].tolist()
    best = torch.topk(table, min(top, table.shape[-1]), dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    tops = [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
    return [TokenLogprob(*row) for row in zip(tokens, chosen, tops, offsets, strict=True)]
