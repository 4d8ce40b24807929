"""`POST /v1/chat/completions`: messages in, one message out."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from serving.api.completions import token_text
from serving.api.errors import bad_request
from serving.api.generation import Generation, encode, room, served_model
from serving.api.protocol import ChatRequest
from serving.engine.messages import Output, TokenLogprob
from serving.host import ModelHost
from serving.tokenizer import Tokenizer


class Chat:
    """One request's answer, whole or as events."""

    def __init__(self, request: ChatRequest, generation: Generation) -> None:
        self.request, self.generation = request, generation
        self.head = {
            "id": f"chatcmpl-{generation.request_id}",
            "created": generation.created_s,
            "model": generation.served.name,
        }

    @classmethod
    async def start(cls, host: ModelHost, body: ChatRequest, request_id: str) -> "Chat":
        served = served_model(host, body.model)
        if served.chat_template is None:
            raise bad_request("This model has no chat template; use /v1/completions", param="messages")
        try:
            messages = [message.for_template() for message in body.messages]
            text = await asyncio.to_thread(served.chat_template.render, messages)
        except ValueError as error:
            raise bad_request(str(error), param="messages") from None
        ids = await encode(served, text, special=False)
        if not ids:
            raise bad_request("The messages are empty", param="messages")
        wanted = body.max_completion_tokens or body.max_tokens
        max_tokens = room(served, ids, wanted)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sequences = [
            (ids, body.sampling(choice=choice, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=False))
            for choice in range(body.n or 1)
        ]
        generation = Generation(
            served, host.metrics, sequences,
            usage_prompt_tokens=len(ids), queue_limit_tokens=host.settings.max_queued_tokens, request_id=request_id,
        )  # fmt: skip
        return cls(body, generation)

    async def whole(self) -> dict[str, Any]:
        n = self.request.n or 1
        texts, reasons = [""] * n, [""] * n
        logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        async for index, output in self.generation:
            texts[index] += output.text
            reasons[index] = output.finish_reason or ""
            logprobs[index] += self._logprobs(output)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": texts[index], "refusal": None},
                "logprobs": {"content": logprobs[index], "refusal": None} if self.request.logprobs else None,
                "finish_reason": reasons[index],
            }
            for index in range(n)
        ]
        usage = self.generation.usage()
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        head = {**self.head, "object": "chat.completion.chunk"}
        usage: dict[str, Any] = {"usage": None} if self.request.include_usage else {}
        for index in range(self.request.n or 1):
            yield {**head, "choices": [_choice(index, {"role": "assistant", "content": ""})], **usage}
        async for index, output in self.generation:
            content = self._logprobs(output)
            logprobs = {"content": content, "refusal": None} if self.request.logprobs else None
            if output.text or content:
                yield {**head, "choices": [_choice(index, {"content": output.text}, logprobs)], **usage}
            if output.finish_reason:
                yield {**head, "choices": [_choice(index, {}, None, output.finish_reason)], **usage}
        if usage:
            yield {**head, "choices": [], "usage": self.generation.usage()}

    def _logprobs(self, output: Output) -> list[dict[str, Any]]:
        tokenizer = self.generation.served.tokenizer
        return [_token(tokenizer, entry) for entry in output.logprobs or ()]


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _token(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": token_text(tokenizer, token_id), "logprob": logprob, "bytes": list(raw)}

    return {**one(entry.token_id, entry.logprob), "top_logprobs": [one(*pair) for pair in entry.top]}
