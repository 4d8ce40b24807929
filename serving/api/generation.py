"""One request on its way through the engine: admitted or refused, counted, followed to its end, never left behind."""

import asyncio
import math
import time
from collections.abc import AsyncIterator

from serving import logs
from serving.api.errors import ApiError, bad_request
from serving.engine.client import EngineError
from serving.engine.messages import Output, SamplingParams
from serving.host import ModelHost, Served
from serving.metrics import Metrics

INLINE_CHARS = 2_000  # up to here, encoding is quicker than handing it to a thread
RETRY_MAX_S = 60


def served_model(host: ModelHost, model: str) -> Served:
    """The model that a request names. Raises `ApiError`: 503 while there is none, 404 for another one."""
    if model != host.name:
        message = f"The model '{model[:200]}' does not exist; this server has '{host.name}'"
        raise ApiError(404, message, param="model", code="model_not_found")
    if host.current is None:
        raise ApiError(503, f"Not ready: {host.why_not_ready}", code="not_ready", retry_after_s=2)
    return host.current


async def encode(served: Served, text: str, *, special: bool) -> list[int]:
    """Token ids of a prompt. A text that cannot fit is refused before it costs anything."""
    if len(text) > served.max_model_len * served.tokenizer.longest_token_bytes:
        raise context_overflow(served, f"more than {served.max_model_len}", 0)
    if len(text) <= INLINE_CHARS:
        return served.tokenizer.encode(text, special=special)
    return await asyncio.to_thread(served.tokenizer.encode, text, special=special)


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
    """Iterates over (choice, output) and keeps the books: usage, latencies, outcome."""

    def __init__(
        self, served: Served, metrics: Metrics, prompts: list[tuple[list[int], SamplingParams]], *,
        usage_prompt_tokens: int, queue_limit_tokens: int, request_id: str,
    ) -> None:  # fmt: skip
        """Submits the sequences. Raises `ApiError`: 429 when the queue is full, 400 when it could never hold them."""
        _admit(served, sum(len(ids) for ids, _ in prompts), limit=max(queue_limit_tokens, served.max_model_len))
        self.served, self.metrics, self.request_id = served, metrics, request_id
        self.created_s = int(time.time())
        self.prompt_tokens = usage_prompt_tokens
        self._num_tokens = [0] * len(prompts)
        self._started_s = time.monotonic()
        self._first_s: dict[int, float] = {}
        self._outcome = "aborted"  # until an end is reached
        self._stream = served.engine.submit(prompts)
        metrics.prompt_tokens.inc(usage_prompt_tokens)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        try:
            async for index, output in self._stream:
                self._count(index, output)
                yield index, output
        except EngineError as error:
            self._outcome = "error"
            raise ApiError(500, f"The answer was interrupted: {error}", code="engine_failed") from None

    def close(self) -> None:
        """Frees what the request still holds, and files its outcome. Must be called once, whatever happened."""
        self._stream.close()
        seconds = time.monotonic() - self._started_s
        self.metrics.requests.labels(self._outcome).inc()
        logs.event(
            "request",
            id=self.request_id,
            outcome=self._outcome,
            prompt_tokens=self.prompt_tokens,
            output_tokens=sum(self._num_tokens),
            ttft_s=round(min(self._first_s.values()) - self._started_s, 4) if self._first_s else None,
            seconds=round(seconds, 4),
        )

    def usage(self) -> dict[str, int]:
        made = sum(self._num_tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def _count(self, index: int, output: Output) -> None:
        self.metrics.output_tokens.inc(output.num_tokens - self._num_tokens[index])
        self._num_tokens[index] = output.num_tokens
        now_s = time.monotonic()
        if index not in self._first_s:
            self._first_s[index] = now_s
            self.metrics.ttft.observe(now_s - self._started_s)
            self.metrics.queue.observe(output.queue_s or 0.0)
        if output.finish_reason:
            self._outcome = output.finish_reason
            if output.num_tokens > 1:
                self.metrics.tpot.observe((now_s - self._first_s[index]) / (output.num_tokens - 1))


def _admit(served: Served, tokens: int, *, limit: int) -> None:
    """The queue is bounded by its tokens, not its requests: tokens are what a newcomer waits for."""
    if tokens > limit:
        message = (
            f"The request has {tokens} prompt tokens in all, and the queue holds {limit}. Send fewer prompts at once"
        )
        raise bad_request(message, code="request_too_large")
    queued = served.engine.queued_tokens
    if queued + tokens > limit:
        wait_s = queued / served.engine.dequeued_tokens_per_s()
        raise ApiError(
            429,
            f"The server is busy: {queued} tokens are queued and the limit is {limit}. Try again later",
            code="rate_limit_exceeded",
            retry_after_s=min(max(math.ceil(wait_s), 1), RETRY_MAX_S),
        )
