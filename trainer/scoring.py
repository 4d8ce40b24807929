"""What a model thinks of tokens: how surprised it is by each, and how it would go on."""

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from trainer.config import SampleConfig
from trainer.data import END_OF_TEXT
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

    Of the prompt as much is seen as the context has room for.
    """
    ids = torch.tensor([*prompt, *continuation][-(model.config.max_context + 1) :])
    count = min(len(continuation), len(ids) - 1)
    logits_LV, wanted_L = model(ids[None, :-1])[0, -count:].float(), ids[-count:]
    nats = F.cross_entropy(logits_LV, wanted_L, reduction="sum")
    return float(nats), bool((logits_LV.argmax(-1) == wanted_L).all())


def continue_text(
    model: Decoder, tokenizer: Tokenizer, prompt: str, *, max_tokens: int, stops: tuple[str, ...] = ()
) -> str:
    """The likeliest continuation alone, up to the end of text, the first of `stops`, or `max_tokens`."""
    prompt_ids = tokenizer.encode(prompt).ids
    text = tokenizer.decode(_go_on(model, tokenizer, prompt_ids, max_tokens, stops)[len(prompt_ids) :])
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def complete(model: Decoder, tokenizer: Tokenizer, config: SampleConfig) -> str:
    """The prompt with its likeliest continuation."""
    return tokenizer.decode(_go_on(model, tokenizer, tokenizer.encode(config.prompt).ids, config.max_tokens, ()))


@torch.inference_mode()
def _go_on(
    model: Decoder, tokenizer: Tokenizer, prompt: list[int], max_tokens: int, stops: tuple[str, ...]
) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens if prompt else 0):
        context = torch.tensor([ids[-model.config.max_context :]])
        ids.append(int(model(context)[0, -1].argmax()))
        if tokenizer.id_to_token(ids[-1]) == END_OF_TEXT:
            return ids[:-1]
        if stops and any(stop in tokenizer.decode(ids[len(prompt) :]) for stop in stops):
            break
    return ids
