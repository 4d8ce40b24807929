"""The HTTP application: routes, and around all of them request ids, the drain, and errors in OpenAI's shape."""

import asyncio
import re
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import logs
from serving.api.chat import Chat
from serving.api.completions import Completion
from serving.api.errors import ApiError
from serving.api.protocol import ChatRequest, CompletionRequest, parse
from serving.api.sse import ClientGone, EventStream, read_body, until_disconnect
from serving.host import ModelHost

BODY_LIMIT_BYTES = 4 << 20
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Lifecycle:
    """Whether new requests are taken, and how many of those taken are not answered to their end."""

    def __init__(self) -> None:
        self.draining = False
        self.active = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def enter(self) -> None:
        self.active += 1
        self.idle.clear()

    def leave(self) -> None:
        self.active -= 1
        if not self.active:
            self.idle.set()


class Gate:
    """Middleware for every request: gives it an id, counts it, and turns it away while the server drains."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle, host: ModelHost) -> None:
        self.app, self.lifecycle, self.host = app, lifecycle, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"x-request-id", request_id.encode())]
                if self.lifecycle.draining:
                    extra.append((b"connection", b"close"))
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        if self.lifecycle.draining and scope["path"].startswith("/v1/"):
            self.host.metrics.requests.labels("unavailable").inc()
            refusal = ApiError(503, "The server is shutting down; try again", code="draining", retry_after_s=1)
            await refusal.response()(scope, receive, send_with_id)
            return
        self.lifecycle.enter()
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.lifecycle.leave()


def create_app(host: ModelHost, lifecycle: Lifecycle) -> FastAPI:
    app = FastAPI(title="Slipway serving", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, lifecycle=lifecycle, host=host)
    _add_probes(app, host, lifecycle)
    _add_models(app, host)
    _add_generation(app, host)
    _add_errors(app, host)
    return app


def _add_probes(app: FastAPI, host: ModelHost, lifecycle: Lifecycle) -> None:
    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        """200 only when a request would be answered now."""
        if lifecycle.draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        if host.current is None:
            return JSONResponse({"status": "not ready", "why": host.why_not_ready}, status_code=503)
        return JSONResponse({"status": "ready", "model": host.name, "digest": host.current.package.digest})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        is_ready = host.current is not None and not lifecycle.draining
        text = host.metrics.render(engines=host.engines, ready=is_ready)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, host: ModelHost) -> None:
    def describe() -> dict[str, Any]:
        served = host.current
        assert served is not None
        return {
            "id": host.name,
            "object": "model",
            "created": served.created_s,
            "owned_by": "slipway",
            "max_model_len": served.max_model_len,
            "digest": served.package.digest,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe()] if host.current is not None else []}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        if host.current is None or model != host.name:
            raise ApiError(404, f"The model '{model[:200]}' does not exist", param="model", code="model_not_found")
        return describe()


def _add_generation(app: FastAPI, host: ModelHost) -> None:
    def schema(kind: type[CompletionRequest] | type[ChatRequest]) -> dict[str, Any]:
        content = {"application/json": {"schema": kind.model_json_schema()}}
        return {"requestBody": {"required": True, "content": content}}

    @app.post("/v1/completions", openapi_extra=schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = parse(CompletionRequest, await read_body(request, limit_bytes=BODY_LIMIT_BYTES))
        return await _answer(request, await Completion.start(host, body, request.scope["request_id"]))

    @app.post("/v1/chat/completions", openapi_extra=schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        body = parse(ChatRequest, await read_body(request, limit_bytes=BODY_LIMIT_BYTES))
        return await _answer(request, await Chat.start(host, body, request.scope["request_id"]))


async def _answer(request: Request, answer: Completion | Chat) -> Response:
    if answer.request.stream:
        return EventStream(answer.events(), on_close=answer.generation.close)
    try:
        return JSONResponse(await until_disconnect(answer.whole(), request.receive))
    finally:
        answer.generation.close()


def _add_errors(app: FastAPI, host: ModelHost) -> None:
    outcomes = {429: "rejected", 503: "unavailable"}

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        if request.method == "POST" and error.code != "engine_failed":  # that one has been counted by its generation
            host.metrics.requests.labels(outcomes.get(error.status, "invalid")).inc()
        return error.response()

    @app.exception_handler(ClientGone)
    async def client_gone(_request: Request, _error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        what = {404: "There is no such route", 405: "The method is not allowed here"}
        message = f"{what.get(error.status_code, error.detail)}: {request.method} {request.url.path[:200]}"
        return ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None).response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        host.metrics.requests.labels("error").inc()
        logs.event("error", level="error", message=f"{type(error).__name__}: {error}", id=request.scope["request_id"])
        return ApiError(500, "The server failed to answer; its log has the reason").response()
