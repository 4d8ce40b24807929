"""What a model thinks of tokens: how surprised it is by each, and how it would go on."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from trainer.data import Dataset
from trainer.log import Log
from trainer.model import Decoder

_BATCH_TOKENS = 8192


@torch.inference_mode()
def token_nats(model: Decoder, tokens: np.ndarray, *, log: Log | None = None) -> np.ndarray:
    """-ln p of tokens 1 … n-1, each given what came before it; from tokens (n,) to nats (n - 1,).

    Windows of the whole context overlap by half, and a token counts where it has the more context: never less than half
    of the window, except at the very beginning.
    """
    window = min(model.config.max_context, len(tokens) - 1)
    stride = max(window // 2, 1)
    starts = [*range(0, len(tokens) - 1 - window, stride), len(tokens) - 1 - window]
    nats = np.empty(len(tokens) - 1)
    batch, scored = max(_BATCH_TOKENS // window, 1), 0
    for at in range(0, len(starts), batch):
        some = starts[at : at + batch]
        x_BL = torch.from_numpy(np.stack([tokens[start : start + window + 1] for start in some]))
        logits_BLV = model(x_BL[:, :-1])
        found_BL = F.cross_entropy(logits_BLV.transpose(1, 2).float(), x_BL[:, 1:], reduction="none").numpy()
        for start, found_L in zip(some, found_BL, strict=True):
            nats[scored : start + window] = found_L[scored - start :]
            scored = start + window
        if log is not None:
            log.progress("evaluate", done=scored, total=2 * len(nats), unit="tokens")
    return nats


@torch.inference_mode()
def judge_continuation(model: Decoder, prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
    """-ln p of the whole continuation given the prompt, and whether each of its tokens is the likeliest.

    Of the prompt, which holds a token or more, as much is seen as the context has room for.
    """
    ids = torch.tensor([*prompt, *continuation][-(model.config.max_context + 1) :])
    count = min(len(continuation), len(ids) - 1)
    logits_LV, wanted_L = model(ids[None, :-1])[0, -count:].float(), ids[-count:]
    nats = F.cross_entropy(logits_LV, wanted_L, reduction="sum")
    return float(nats), bool((logits_LV.argmax(-1) == wanted_L).all())


class Writer:
    """A model that writes, in the words of the dataset that it was trained on."""

    def __init__(self, model: Decoder, dataset: Dataset) -> None:
        self.model, self.tokenizer, self.end_of_text = model, dataset.tokenizer(), dataset.end_of_text
        self._ends = dataset.ends

    def read(self, prompt: str) -> list[int]:
        """The tokens of a prompt; of none at all the one that comes before every text."""
        return self.tokenizer.encode(prompt).ids or [self.end_of_text]

    def go_on(self, prompt: str, *, max_tokens: int, stops: Sequence[str] = ()) -> str:
        """The likeliest continuation alone, up to an end, the first of `stops`, or `max_tokens`."""
        text = self.tokenizer.decode(self._likeliest(self.read(prompt), max_tokens, stops))
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]

    def complete(self, prompt: str, *, max_tokens: int) -> str:
        """The prompt with its likeliest continuation."""
        ids = self.read(prompt)
        return self.tokenizer.decode([*ids, *self._likeliest(ids, max_tokens, ())])

    @torch.inference_mode()
    def _likeliest(self, prompt: list[int], max_tokens: int, stops: Sequence[str]) -> list[int]:
        written: list[int] = []
        for _ in range(max_tokens):
            context = torch.tensor([[*prompt, *written][-self.model.config.max_context :]])
            token = int(self.model(context)[0, -1].argmax())
            if token in self._ends:
                break
            written.append(token)
            if stops and any(stop in self.tokenizer.decode(written) for stop in stops):
                break
        return written
