"""One HTTP/1.1 connection: uvicorn's, with limits on what a client may hold before it has asked for anything.

A slow-loris client opens connections and sends a header every few seconds; another sends one header without end.
Neither reaches the application, so neither can be answered for there.
"""

import asyncio
import logging
import re
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serving.api.errors import ApiError

HEAD_TIMEOUT_S = 10.0  # from the first byte of a request to the end of its headers
HEAD_LIMIT_BYTES = 64 << 10
SKIPPED_BYTES = 64 << 10  # so much of a refused request's body is read for nothing, and the connection kept
HEAD_END = re.compile(rb"\n\r?\n")
METHOD = re.compile(rb"[A-Z]+( |$)")
LINGER_S = 1.0  # after a refusal: closing at once, with bytes unread, would take the answer away from the client

logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a client's bad bytes are no news of ours


class Doorstep(asyncio.Protocol):
    """A new connection until its first head has come: little more than the bytes, since most of what is hostile ends here.

    Half of what a connection costs is the parser and all that uvicorn keeps beside it: a `Connection` takes over once
    there is something for it to do, be it to refuse.
    """

    __slots__ = ("_head", "_timer", "connection", "server_state", "transport")

    def __init__(self, *, server_state: ServerState, **connection: Any) -> None:
        self.server_state, self.connection = server_state, connection
        self._head = bytearray()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.server_state.connections.add(self)  # pyright: ignore[reportArgumentType]: what uvicorn does is `shutdown`

    def data_received(self, data: bytes) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(HEAD_TIMEOUT_S, self._is_late)
        seen = max(0, len(self._head) - 2)  # where the end may have begun
        self._head += data
        whole = HEAD_END.search(self._head, seen) or len(self._head) > HEAD_LIMIT_BYTES
        if whole or not METHOD.match(self._head):
            self._enter()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._leave()

    def shutdown(self) -> None:
        self.transport.close()

    def _is_late(self) -> None:
        self._enter().head_is_late()

    def _enter(self) -> "Connection":
        self._leave()
        connection = Connection(server_state=self.server_state, **self.connection)
        self.transport.set_protocol(connection)
        connection.connection_made(self.transport)
        connection.data_received(bytes(self._head))
        return connection

    def _leave(self) -> None:
        self.server_state.connections.discard(self)  # pyright: ignore[reportArgumentType]
        if self._timer is not None:
            self._timer.cancel()


class Connection(HttpToolsProtocol):
    """Refuses a request whose head is too slow (408), too large (431) or no HTTP (400), in OpenAI's shape."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._refused = False

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.head_is_late)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_LIMIT_BYTES:
            self._refuse(ApiError(431, f"The headers are larger than {HEAD_LIMIT_BYTES} bytes"))

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        fields = dict(self.headers)
        is_large = b"transfer-encoding" in fields or int(fields.get(b"content-length", 0)) > SKIPPED_BYTES
        self._stop_timer()
        super().on_headers_complete()
        if is_large:  # who is answered before it has come is refused: the rest is not read, and the client told so
            self.cycle.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
            self.cycle.transport = cast("asyncio.Transport", Lingering(self))

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.cycle.default_headers, self.cycle.transport = self.server_state.default_headers, self.transport
        self._in_head = True  # whatever comes next on this connection is the next request's head

    def on_response_complete(self) -> None:
        if not self._refused:
            super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:  # what uvicorn calls when the bytes are no HTTP
        self._refuse(ApiError(400, msg))

    def head_is_late(self) -> None:
        self._refuse(ApiError(408, f"The headers did not come within {HEAD_TIMEOUT_S:g} seconds"))

    def _refuse(self, error: ApiError) -> None:
        """Answers and hangs up; while an answer to an earlier request is on its way, hangs up only."""
        self._stop_timer()
        if self._refused or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            response = error.response()
            head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n".encode()
            lines = [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
            self.transport.write(b"".join([head, *lines, b"connection: close\r\n\r\n", bytes(response.body)]))
            self.hang_up()
        else:
            self._refused = True
            self.transport.close()

    def hang_up(self) -> None:
        """Reads no more, and closes once the client has had time to read what it was told."""
        self._refused = True
        self.flow.pause_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class Lingering:
    """What an answer is written to while its request's body is still to come."""

    def __init__(self, connection: Connection) -> None:
        self.write, self.is_closing = connection.transport.write, connection.transport.is_closing
        self.close = connection.hang_up
