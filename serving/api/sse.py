"""Server-sent events, with a client that may leave: the generator is closed at once when it does."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.api.errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
to_json = json.JSONEncoder(separators=(",", ":")).encode  # `dumps` would make an encoder for each event


class ClientGone(Exception):
    """The client hung up: there is nobody to answer."""


async def no_answer(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


class EventStream(Response):
    """Sends `events`, each with what `head` says too, then `[DONE]`; an `ApiError` in between is the last event.

    Events that come together are written together. `head` is made JSON once: it is the longer part of most of them.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[list[dict[str, Any]], None], *,
        head: dict[str, Any], on_close: Callable[[], None], headers: dict[str, str],
    ) -> None:  # fmt: skip
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._events, self._on_close = events, on_close
        self._head = f"data: {to_json(head)[:-1]},"

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002
        receive: Receive,
        send: Send,
    ) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await until_disconnect(self._send_all(send), receive)
        except ClientGone:
            return
        finally:
            await self._events.aclose()
            self._on_close()

    async def _send_all(self, send: Send) -> None:
        last = DONE
        try:
            async for events in self._events:
                text = "".join([f"{self._head}{to_json(event)[1:]}\n\n" for event in events])
                if text:
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except ApiError as error:  # the status has been sent, so the stream itself must say that it is broken
            last = f"data: {to_json(error.body())}\n\n".encode()
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def until_disconnect(work: Awaitable[T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client disconnects. Raises `ClientGone` then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, *, limit_bytes: int, timeout_s: float) -> bytes:
    """The request's body. Raises `ClientGone`, and `ApiError`: 413 as soon as it is too large, 408 when it is slow."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_all(request, limit_bytes)
    except TimeoutError:
        close = {"connection": "close"}  # the rest of the body may still come, and is no request
        raise ApiError(408, f"The body did not come within {timeout_s:g} seconds", headers=close) from None


async def _read_all(request: Request, limit_bytes: int) -> bytes:
    too_large = ApiError(413, f"The body is larger than {limit_bytes} bytes", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise too_large
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit_bytes:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)
