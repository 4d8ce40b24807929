"""`POST /v1/chat/completions`: messages in, one message or a call of a tool out."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from serving.api.completions import token_text
from serving.api.context import Caller, Context
from serving.api.errors import bad_request
from serving.api.generation import Generation, encode, room, served_model
from serving.api.messages import Message, Tool
from serving.api.protocol import ChatRequest
from serving.api.tools import Call, CallParser, introduce, structure_of
from serving.engine.messages import Output, TokenLogprob
from serving.host import Served
from serving.tokenizer import Tokenizer


class Chat:
    """One request's answer, whole or as events."""

    def __init__(self, request: ChatRequest, generation: Generation) -> None:
        self.request, self.generation = request, generation
        self.head = {
            "id": f"chatcmpl-{generation.caller.request_id}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": generation.created_s,
            "model": generation.served.name,
        }
        self._parsers = [_parser(request) for _ in range(request.n or 1)]

    @classmethod
    async def start(cls, context: Context, body: ChatRequest, caller: Caller) -> "Chat":
        served = served_model(context, body.model)
        ids = await chat_ids(served, body.messages, body.callable_tools)
        max_tokens = room(served, ids, body.max_completion_tokens or body.max_tokens)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        structure = structure_of(body.callable_tools) if body.must_call else None
        sequences = [
            (
                ids,
                body.sampling(
                    choice=choice, max_tokens=max_tokens, logprobs=logprobs,
                    vocab_size=served.vocab_size, structure=structure,
                ),
            )
            for choice in range(body.n or 1)
        ]  # fmt: skip
        return cls(body, Generation(context, caller, served, sequences, usage_prompt_tokens=len(ids)))

    async def whole(self) -> dict[str, Any]:
        n = self.request.n or 1
        texts, reasons = [""] * n, [""] * n
        calls: list[list[Call]] = [[] for _ in range(n)]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        async for outputs in self.generation:
            for index, output in outputs:
                said, called, reason = self._read(index, output)
                texts[index] += said
                calls[index] += called
                reasons[index] = reason or ""
                logprobs[index] += self._logprobs(output)
        choices = [
            {
                "index": index,
                "message": _message(texts[index], calls[index]),
                "logprobs": {"content": logprobs[index], "refusal": None} if self.request.logprobs else None,
                "finish_reason": reasons[index],
            }
            for index in range(n)
        ]
        usage = self.generation.usage()
        return {**self.head, "choices": choices, "usage": usage}

    async def events(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        usage: dict[str, Any] = {"usage": None} if self.request.include_usage else {}
        num_calls = [0] * (self.request.n or 1)
        opening = {"role": "assistant", "content": ""}
        yield [{"choices": [_choice(index, opening)], **usage} for index in range(self.request.n or 1)]
        async for outputs in self.generation:
            choices = [choice for index, output in outputs for choice in self._deltas(index, output, num_calls)]
            yield [{"choices": [choice], **usage} for choice in choices]
        if usage:
            yield [{"choices": [], "usage": self.generation.usage()}]

    def _deltas(self, index: int, output: Output, num_calls: list[int]) -> Iterator[dict[str, Any]]:
        """What an output adds to a choice that is streamed: text, calls, and the end."""
        said, calls, reason = self._read(index, output)
        content = self._logprobs(output)
        if said or content:
            logprobs = {"content": content, "refusal": None} if self.request.logprobs else None
            yield _choice(index, {"content": said}, logprobs)
        for call in calls:
            yield _choice(index, {"tool_calls": [{"index": num_calls[index], **call.body()}]})
            num_calls[index] += 1
        if reason:
            yield _choice(index, {}, None, reason)

    def _read(self, index: int, output: Output) -> tuple[str, list[Call], str | None]:
        """What an output says, what it calls, and why the answer ends with it, if it does."""
        parser = self._parsers[index]
        if parser is None:
            return output.text, [], output.finish_reason
        said, calls = parser.push(output.text)
        if output.finish_reason is None:
            return said, calls, None
        rest, last = parser.flush()
        reason = "tool_calls" if parser.num_calls and output.finish_reason == "stop" else output.finish_reason
        return said + rest, calls + last, reason

    def _logprobs(self, output: Output) -> list[dict[str, Any]]:
        tokenizer = self.generation.served.tokenizer
        return [_token(tokenizer, entry) for entry in output.logprobs or ()]


async def chat_ids(served: Served, messages: list[Message], tools: list[Tool]) -> list[int]:
    """The prompt that asks for the next message. Raises `ApiError` when the template objects, or there is none."""
    template = served.chat_template
    if template is None:
        raise bad_request("This model has no chat template; use /v1/completions", param="messages")
    plain = [message.for_template() for message in messages]
    speaks_of_tools = bool(tools) or any(m["role"] == "tool" or "tool_calls" in m for m in plain)
    if speaks_of_tools and not template.knows_tools:
        plain, tools = introduce(plain, tools), []
    try:
        described = [tool.model_dump(exclude_none=True) for tool in tools]
        text = await asyncio.to_thread(template.render, plain, tools=described)
    except ValueError as error:
        raise bad_request(str(error), param="messages") from None
    ids = await encode(served, text, special=False)
    if not ids:
        raise bad_request("The messages are empty", param="messages")
    return ids


def _parser(request: ChatRequest) -> CallParser | None:
    names = {tool.function.name for tool in request.callable_tools}
    most_calls = 1 if request.parallel_tool_calls is False else None
    return CallParser(names, forced=request.must_call, most_calls=most_calls) if names else None


def _message(text: str, calls: list[Call]) -> dict[str, Any]:
    called = {"tool_calls": [call.body() for call in calls]} if calls else {}
    return {"role": "assistant", "content": text if text or not calls else None, "refusal": None, **called}


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _token(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": token_text(tokenizer, token_id), "logprob": logprob, "bytes": list(raw)}

    return {**one(entry.token_id, entry.logprob), "top_logprobs": [one(*pair) for pair in entry.top]}
