"""What happens to every request before its route: an id, the drain, who asks, and whether there is memory for it."""

import re
import uuid
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import tracing
from serving.api.context import Caller, Context, caller_with
from serving.api.errors import ApiError
from serving.auth import Key
from serving.sessions import StoreError

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
PROBES = ("/health/live", "/health/ready")
# The chat page is what one logs in with: its files hold nothing, and its session routes look at the session themselves.
OPEN = (*PROBES, "/")
COOKIE = "slipway_session"
TIMEOUT_HEADER = "x-request-timeout-s"


class Gate:
    """The outermost middleware. A refusal here costs no more than reading the headers."""

    def __init__(self, app: ASGIApp, *, context: Context) -> None:
        self.app, self.context = app, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        lifecycle = self.context.lifecycle

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"x-request-id", request_id.encode())]
                if lifecycle.leaving:
                    extra.append((b"connection", b"close"))
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        lifecycle.enter()
        try:
            scope["caller"] = await self._admit(scope, headers, request_id)
            await self.app(scope, receive, send_with_id)
        except ApiError as refusal:  # only from `_admit`: the routes' own errors have become answers by now
            self.context.host.metrics.requests.labels("unavailable" if refusal.status == 503 else "invalid").inc()
            await refusal.response()(scope, receive, send_with_id)
        finally:
            lifecycle.leave()

    async def _admit(self, scope: Scope, headers: Headers, request_id: str) -> Caller:
        """Who asks. Raises `ApiError`: 503 when nothing new is taken, 401 when it is nobody known."""
        path = scope["path"]
        trace = tracing.parse(headers.get("traceparent", ""))
        if path in PROBES or (path == "/metrics" and self.context.keys is None):
            return Caller(request_id, trace)
        if self.context.lifecycle.draining and path != "/metrics":
            raise ApiError(503, "The server is shutting down; try again", code="draining", retry_after_s=1)
        deadline_s = _deadline_s(headers)
        if not is_open(path) and scope["method"] == "POST" and self.context.memory.look():
            raise ApiError(503, "The server is short of memory; try again later", code="overloaded", retry_after_s=5)
        if self.context.keys is None or is_open(path):
            return Caller(request_id, trace, deadline_s=deadline_s)
        key = await self._key(headers)
        if key is None:
            message = "No valid API key was given. Send it as 'Authorization: Bearer <key>'"
            raise ApiError(401, message, code="invalid_api_key")
        return caller_with(key, self.context, request_id=request_id, trace=trace, deadline_s=deadline_s)

    async def _key(self, headers: Headers) -> Key | None:
        """The key of the request: its own, or that of the chat page's session."""
        assert self.context.keys is not None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.context.keys.find(secret.strip())
        token = session_token(headers)
        if not token or not same_origin(headers):
            return None
        try:
            user = await self.context.sessions.user(token)
        except StoreError as error:
            raise store_away(error) from None
        return self.context.keys.named(user) if user else None


def store_away(error: StoreError) -> ApiError:
    return ApiError(503, f"Try again: {error}", code="sessions_unavailable", retry_after_s=2)


def is_open(path: str) -> bool:
    """Whether a route asks for no key."""
    return path in OPEN or path.startswith("/web/")


def session_token(headers: Mapping[str, str]) -> str:
    """The session cookie's value, or nothing. Beside it may be what another program of this host set, in any form."""
    return cookie_parser(headers.get("cookie", "")).get(COOKIE, "")


def same_origin(headers: Mapping[str, str]) -> bool:
    """False when another site's page makes the browser ask: the cookie must not speak for that one."""
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host")
    except ValueError:  # of an address that is none
        return False


def _deadline_s(headers: Headers) -> float | None:
    """How long the client will wait, when it says so. Raises `ApiError` when that is no time."""
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) == 0:
        raise ApiError(400, f"'{TIMEOUT_HEADER}' must be seconds above 0, such as 2.5", param=TIMEOUT_HEADER)
    return float(text)
