"""One request on its way through the engine: admitted or refused, counted, followed to its end, never left behind."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from serving import logs
from serving.api.context import Caller, Context
from serving.api.errors import ApiError, bad_request
from serving.engine.background import be_patient
from serving.engine.client import EngineError
from serving.engine.messages import Output, SamplingParams
from serving.host import Served

INLINE_CHARS = 2_000  # up to here, encoding is quicker than handing it to a thread
LARGE_CHARS = 32_000  # above, texts wait for one another, and for whatever else there is to compute
PATIENT = ThreadPoolExecutor(1, "tokenizer", initializer=be_patient)
RETRY_MAX_S = 60
BACKGROUND_SHARE = 0.5  # of the queue: as much may requests of the class `batch` fill, and never lock out the others


class DeadlineExceeded(EngineError):
    """The request took longer than its client, or the server, gives it."""


def served_model(context: Context, model: str) -> Served:
    """The model, or the adapter of it, that a request names. Raises `ApiError`: 503 while there is none, 404 for others."""
    host = context.host
    adapter = host.adapters.ready.get(model)
    if model != host.name and adapter is None:
        wrong = host.adapters.refused.get(model)
        why = f"cannot be served: {wrong}" if wrong else f"does not exist; this server has '{host.name}'"
        raise ApiError(404, f"The model '{model[:200]}' {why}", param="model", code="model_not_found")
    if host.current is None:
        raise ApiError(503, f"Not ready: {host.why_not_ready}", code="not_ready", retry_after_s=2)
    return host.current if adapter is None else replace(host.current, name=model, adapter=adapter.ref)


async def encode(served: Served, text: str, *, special: bool) -> list[int]:
    """Token ids of a prompt. A text that cannot fit is refused before it costs anything."""
    most, tokenizer = served.max_model_len, served.tokenizer
    if len(text) <= INLINE_CHARS:
        ids = tokenizer.encode_at_most(text, most, special=special)
    elif len(text) <= most * tokenizer.longest_token_bytes:
        work = partial(tokenizer.encode_at_most, text, most, special=special)
        thread = None if len(text) <= LARGE_CHARS else PATIENT
        ids = await asyncio.get_running_loop().run_in_executor(thread, work)
    else:
        ids = None
    if ids is None:
        raise context_overflow(served, f"more than {most}", 0)
    return ids


async def prompt_ids(served: Served, prompt: str | list[int], *, param: str) -> list[int]:
    """Token ids of a prompt that is text or ids. Raises `ApiError` for ids that the model does not have."""
    ids = await encode(served, prompt, special=True) if isinstance(prompt, str) else prompt
    if len(ids) > served.max_model_len:
        raise context_overflow(served, str(len(ids)), 0)
    check_ids(served, ids, param=param)
    if not ids:  # an answer to nothing begins where every document begins: after the end of another
        ids = sorted(served.tokenizer.eos_ids)[:1]
    if not ids:
        raise bad_request(f"The {param} is empty, and this model has no token to begin with", param=param)
    return ids


def check_ids(served: Served, ids: Sequence[int], *, param: str) -> None:
    if max(ids, default=0) >= served.vocab_size:
        raise bad_request(f"Token {max(ids)} is outside the vocabulary of {served.vocab_size}", param=param)


def room(served: Served, prompt_ids: list[int], max_tokens: int | None) -> int:
    """How many tokens may be made: `max_tokens`, or all that the context has left. Raises `ApiError` on overflow."""
    left = served.max_model_len - len(prompt_ids)
    if (max_tokens or 0) > left or (max_tokens is None and left < 1):
        raise context_overflow(served, str(len(prompt_ids)), max_tokens or 1)
    return left if max_tokens is None else max_tokens


def context_overflow(served: Served, prompt_tokens: str, max_tokens: int) -> ApiError:
    message = (
        f"This model's maximum context length is {served.max_model_len} tokens, but the request needs "
        f"{prompt_tokens} in the prompt and {max_tokens} for the completion. Shorten one of them"
    )
    return bad_request(message, code="context_length_exceeded")


class Generation:
    """Iterates over lists of (choice, output), as they come, and keeps the books: usage, quota, latencies, outcome."""

    def __init__(
        self, context: Context, caller: Caller, served: Served, prompts: list[tuple[list[int], SamplingParams]], *,
        usage_prompt_tokens: int,
    ) -> None:  # fmt: skip
        """Submits the sequences. Raises `ApiError`: 429 when the queue or the quota is full, 400 when it never fits."""
        submitted = sum(len(ids) for ids, _ in prompts)
        _admit(context, caller, served, submitted)
        take_quota(caller, usage_prompt_tokens)
        self.context, self.caller, self.served = context, caller, served
        self.created_s = int(time.time())
        self.prompt_tokens = usage_prompt_tokens
        self._cached_tokens = 0
        self._copies = submitted // max(usage_prompt_tokens, 1)  # of each prompt: usage counts it once
        self.structured = any(params.structure is not None for _, params in prompts)
        self._metrics = context.host.metrics
        self._num_tokens = [0] * len(prompts)
        self._started_s = time.monotonic()
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._outcome = "aborted"  # until an end is reached
        self._peeked: list[list[tuple[int, Output]]] = []
        self._stream = served.engine.submit(
            prompts, priority=caller.priority, tenant=caller.tenant, adapter=served.adapter
        )
        self._outputs = aiter(self._stream)
        limit_s = min(caller.deadline_s or math.inf, context.settings.max_request_s)
        late = DeadlineExceeded(f"it was not complete after {limit_s:g} seconds")
        self._timer = asyncio.get_running_loop().call_later(limit_s, self._stream.fail, late)
        self._metrics.prompt_tokens.inc(usage_prompt_tokens)

    async def peek(self) -> None:
        """Waits for the first outputs, so that a refusal by the engine can still become the answer's status."""
        self._peeked.append(await self._next())

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Output]]]:
        for outputs in self._peeked:
            yield outputs
        while True:
            try:
                outputs = await self._next()
            except StopAsyncIteration:
                return
            yield outputs

    def close(self) -> None:
        """Frees what the request still holds, and files its outcome. Must be called once, whatever happened."""
        self._timer.cancel()
        self._stream.close()
        seconds = time.monotonic() - self._started_s
        made = sum(self._num_tokens)
        if self.caller.quota is not None:
            self.caller.quota.charge(made)
        self._metrics.requests.labels(self._outcome).inc()
        fields = {
            "id": self.caller.request_id,
            "outcome": self._outcome,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": made,
            "ttft_s": round(min(self._first_s.values()) - self._started_s, 4) if self._first_s else None,
            "seconds": round(seconds, 4),
        }
        trace = self.caller.trace
        extra = {"key": self.caller.name or None, "trace_id": trace.trace_id if trace else None}
        logs.event("request", **fields, **{name: value for name, value in extra.items() if value is not None})
        if self.context.spans is not None:
            self._record(seconds, made)

    def usage(self) -> dict[str, object]:
        made = sum(self._num_tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens // max(self._copies, 1)},
        }

    async def _next(self) -> list[tuple[int, Output]]:
        """The next outputs. Raises `ApiError` when there will be none, and `StopAsyncIteration` at the end."""
        try:
            outputs = await anext(self._outputs)
        except DeadlineExceeded as error:
            self._outcome = "deadline"
            raise ApiError(504, f"The answer was given up: {error}", code="deadline_exceeded") from None
        except EngineError as error:
            self._outcome = "error"
            raise ApiError(500, f"The answer was interrupted: {error}", code="engine_failed") from None
        now_s = time.monotonic()
        for index, output in outputs:
            if output.finish_reason in ("error", "failed"):
                raise self._refusal(output)
            self._count(index, output, now_s)
        return outputs

    def _refusal(self, output: Output) -> ApiError:
        if output.finish_reason == "failed":
            self._outcome = "error"
            return ApiError(500, f"The answer failed: {output.text}", code="engine_failed")
        self._outcome = "invalid"
        if not self.structured:
            return bad_request(output.text, code="unsupported")
        return bad_request(output.text, param="response_format", code="invalid_structure")

    def _count(self, index: int, output: Output, now_s: float) -> None:
        metrics = self._metrics
        new = output.num_tokens - self._num_tokens[index]
        self._num_tokens[index] = output.num_tokens
        if index not in self._first_s:
            self._first_s[index] = now_s
            self._cached_tokens += output.cached_tokens
            metrics.ttft.observe(now_s - self._started_s)
            metrics.queue.observe(output.queue_s or 0.0)
        elif new:
            metrics.itl.observe((now_s - self._last_s[index]) / new)
        self._last_s[index] = now_s
        if output.finish_reason:
            self._outcome = output.finish_reason
            if output.num_tokens > 1:
                metrics.tpot.observe((now_s - self._first_s[index]) / (output.num_tokens - 1))

    def _record(self, seconds: float, made: int) -> None:
        assert self.context.spans is not None
        attributes = {
            "gen_ai.provider.name": "slipway",
            "gen_ai.request.model": self.served.name,
            "gen_ai.usage.input_tokens": self.prompt_tokens,
            "gen_ai.usage.output_tokens": made,
            "gen_ai.response.finish_reasons": [self._outcome],
            "slipway.request_id": self.caller.request_id,
        }
        self.context.spans.record(
            f"generate {self.served.name}", trace=self.caller.trace, seconds=seconds, attributes=attributes,
            failed=self._outcome in ("error", "deadline"),
        )  # fmt: skip


def _admit(context: Context, caller: Caller, served: Served, tokens: int) -> None:
    """The queue is bounded by its tokens, not its requests: tokens are what a newcomer waits for."""
    limit = max(context.settings.max_queued_tokens, served.max_model_len)
    if tokens > limit:
        message = (
            f"The request has {tokens} prompt tokens in all, and the queue holds {limit}. Send fewer prompts at once"
        )
        raise bad_request(message, code="request_too_large")
    queued = served.engine.queued_tokens
    share = max(int(limit * BACKGROUND_SHARE), served.max_model_len) if caller.priority < 0 else limit
    if queued + tokens > share:
        # When there will be room for it, at the rate at which the queue has been getting shorter.
        wait_s = (queued + tokens - share) / served.engine.dequeued_tokens_per_s()
        raise ApiError(
            429,
            f"The server is busy: {queued} tokens are queued and the limit is {share}. Try again later",
            code="rate_limit_exceeded",
            retry_after_s=min(max(math.ceil(wait_s), 1), RETRY_MAX_S),
        )


def take_quota(caller: Caller, prompt_tokens: int = 0) -> None:
    """Counts one request of the caller's. Raises `ApiError` (429) when that is more than the key may ask for."""
    if caller.quota is None:
        return
    short = caller.quota.admit(prompt_tokens)
    if short is not None:
        name, wait_s = short
        message = f"The quota of this key is used up: {name} per minute. Try again in {wait_s} seconds"
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s, headers=caller.quota.headers())
