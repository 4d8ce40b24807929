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
def continuation_nats(model: Decoder, prompt: list[int], continuation: list[int]) -> float:
    """-ln p of the whole continuation given the prompt, of which as much is seen as the context has room for."""
    ids = torch.tensor([*prompt, *continuation][-(model.config.max_context + 1) :])
    count = min(len(continuation), len(ids) - 1)
    logits_LV = model(ids[None, :-1])[0, -count:].float()
    return float(F.cross_entropy(logits_LV, ids[-count:], reduction="sum"))


@torch.inference_mode()
def complete(model: Decoder, tokenizer: Tokenizer, config: SampleConfig, *, stop: str | None = None) -> str:
    """The likeliest completion of the prompt, with the prompt; to the end of text, `stop`, or `max_tokens`."""
    ids = tokenizer.encode(config.prompt).ids
    begun = len(ids)
    if not ids:
        return ""
    for _ in range(config.max_tokens):
        context = torch.tensor([ids[-model.config.max_context :]])
        ids.append(int(model(context)[0, -1].argmax()))
        if tokenizer.id_to_token(ids[-1]) == END_OF_TEXT:
            ids.pop()
            break
        if stop is not None and stop in tokenizer.decode(ids[begun:]):
            break
    return tokenizer.decode(ids)
