"""`POST /v1/completions`: text in, text out."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from serving.api.context import Caller, Context
from serving.api.generation import Generation, prompt_ids, room, served_model
from serving.api.protocol import CompletionRequest, each
from serving.engine.messages import Output, SamplingParams, TokenLogprob
from serving.tokenizer import Tokenizer


class Completion:
    """One request's answer, whole or as events. Candidate i·m + j is the j-th answer to the i-th prompt; m is n, or `best_of`."""

    def __init__(self, request: CompletionRequest, generation: Generation, prompts: list[list[int]]) -> None:
        self.request, self.generation = request, generation
        tokenizer = generation.served.tokenizer
        m = request.num_candidates
        self.echoes = [tokenizer.decode(ids) if request.echo else "" for ids in prompts for _ in range(m)]
        self.prompts = [ids for ids in prompts for _ in range(m)]
        self.offsets = [len(echo) for echo in self.echoes]  # where each choice's own text begins
        self.head = {
            "id": f"cmpl-{generation.caller.request_id}",
            "object": "text_completion",
            "created": generation.created_s,
            "model": generation.served.name,
        }

    @classmethod
    async def start(cls, context: Context, body: CompletionRequest, caller: Caller) -> "Completion":
        served = served_model(context, body.model)
        prompts = [await prompt_ids(served, prompt, param="prompt") for prompt in each(body.prompt)]
        wanted = 16 if body.max_tokens is None else body.max_tokens
        sequences: list[tuple[list[int], SamplingParams]] = []
        chosen_later = body.num_candidates > (body.n or 1)  # by their likelihood, which the engine then reports
        for ids in prompts:
            max_tokens = room(served, ids, wanted)
            for choice in range(body.num_candidates):
                params = body.sampling(
                    choice=choice, max_tokens=max_tokens, vocab_size=served.vocab_size,
                    logprobs=0 if chosen_later and body.logprobs is None else body.logprobs,
                    prompt_logprobs=bool(body.echo) and body.logprobs is not None,
                )  # fmt: skip
                sequences.append((ids, params))
        tokens = sum(map(len, prompts))
        return cls(body, Generation(context, caller, served, sequences, usage_prompt_tokens=tokens), prompts)

    async def whole(self) -> dict[str, Any]:
        texts = list(self.echoes)
        logprobs: list[dict[str, list[Any]] | None] = [None] * len(texts)
        reasons: list[str | None] = [None] * len(texts)
        scores = [0.0] * len(texts)  # mean logprob of a token
        async for outputs in self.generation:
            for index, output in outputs:
                texts[index] += output.text
                reasons[index] = output.finish_reason or reasons[index]
                scores[index] = output.cumulative_logprob / max(output.num_tokens, 1)
                new = self._logprobs(index, output)
                if new is not None:
                    old = logprobs[index] or {key: [] for key in new}
                    logprobs[index] = {key: old[key] + new[key] for key in new}
        choices = [
            {"index": i, "text": texts[at], "logprobs": logprobs[at], "finish_reason": reasons[at]}
            for i, at in enumerate(self._best(scores))
        ]
        return {**self.head, "choices": choices, "usage": self.generation.usage()}

    def _best(self, scores: list[float]) -> list[int]:
        """Which candidates are answered: of each prompt's the `n` that are likeliest by the token, best first."""
        m, n = self.request.num_candidates, self.request.n or 1
        if m == n:
            return list(range(len(scores)))
        groups = [range(start, start + m) for start in range(0, len(scores), m)]
        return [at for group in groups for at in sorted(group, key=lambda at: -scores[at])[:n]]

    async def events(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        usage: dict[str, Any] = {"usage": None} if self.request.include_usage else {}
        if self.request.logprobs is None:  # with logprobs, the echo comes with the prompt's
            echoes = [_choice(index, echo) for index, echo in enumerate(self.echoes) if echo]
            yield [{"choices": [choice], **usage} for choice in echoes]
        async for outputs in self.generation:
            choices = [choice for index, output in outputs for choice in self._deltas(index, output)]
            yield [{"choices": [choice], **usage} for choice in choices]
        if usage:
            yield [{"choices": [], "usage": self.generation.usage()}]

    def _deltas(self, index: int, output: Output) -> Iterator[dict[str, Any]]:
        """What an output adds to a choice that is streamed, if anything."""
        text = output.text
        if output.prompt_logprobs is not None:
            text = self.echoes[index] + text
        logprobs = self._logprobs(index, output)
        if text or output.finish_reason or (logprobs and logprobs["tokens"]):
            yield _choice(index, text, logprobs, output.finish_reason)

    def _logprobs(self, index: int, output: Output) -> dict[str, list[Any]] | None:
        if output.logprobs is None or self.request.logprobs is None:
            return None
        tokenizer, top = self.generation.served.tokenizer, self.request.logprobs or 0
        result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if output.prompt_logprobs is not None:
            _add_prompt(result, tokenizer, self.prompts[index], output.prompt_logprobs, top)
        for entry in output.logprobs:
            _add(result, tokenizer, entry, top, self.offsets[index] + entry.offset)
        return result


def _choice(
    index: int, text: str, logprobs: dict[str, list[Any]] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is no text by itself is spelled by its bytes, as OpenAI does."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _add(result: dict[str, list[Any]], tokenizer: Tokenizer, entry: TokenLogprob, top: int, offset: int) -> None:
    alternatives = {token_text(tokenizer, i): value for i, value in entry.top}
    result["tokens"].append(token_text(tokenizer, entry.token_id))
    result["token_logprobs"].append(entry.logprob)
    result["top_logprobs"].append(alternatives if top else None)
    result["text_offset"].append(offset)


def _add_prompt(
    result: dict[str, list[Any]],
    tokenizer: Tokenizer,
    ids: list[int],
    entries: Sequence[TokenLogprob | None],
    top: int,
) -> None:
    """The echoed prompt's tokens. The first has no logprob: nothing came before it that could predict it."""
    offset = 0
    for token_id, entry in zip(ids, entries, strict=True):
        if entry is None:
            for key, value in (("token_logprobs", None), ("top_logprobs", None), ("text_offset", 0)):
                result[key].append(value)
            result["tokens"].append(token_text(tokenizer, token_id))
        else:
            _add(result, tokenizer, entry, top, offset)
        offset += len(tokenizer.decode([token_id]))
