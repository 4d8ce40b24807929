"""The HTTP application: its routes, each described truly in `/openapi.json`, and errors in OpenAI's shape."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serving import logs
from serving.api import answers
from serving.api.batches import BatchRequest, add_batches
from serving.api.chat import Chat
from serving.api.completions import Completion
from serving.api.context import Caller, Context
from serving.api.document import install, path_parameter, takes
from serving.api.embeddings import Embeddings, detokenize, tokenize
from serving.api.errors import ApiError, documented, http_error
from serving.api.gate import Gate
from serving.api.generation import Generation, take_quota
from serving.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from serving.api.sse import ClientGone, EventStream, no_answer, read_body, until_disconnect
from serving.api.web import Conversation, Login, add_chat_page
from serving.batches import BatchStore

BODIES = [
    CompletionRequest, ChatRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest, Login, Conversation,
    BatchRequest,
]  # fmt: skip
LEAST_BODY_LIMIT_BYTES = 1 << 20
BYTES_PER_TOKEN = 16  # of a body: ids take up to 7, text about 4, and 12 where each character is escaped
BODY_TIMEOUT_S = 30.0
R = TypeVar("R", bound=BaseModel)
ASK_ERRORS = documented(400, 401, 404, 408, 413, 429, 500, 503, 504)


class Answer(Protocol):
    """A request being answered: whole, or by the events of its stream."""

    generation: Generation
    head: dict[str, Any]  # what the whole answer says, and each of its events

    async def whole(self) -> dict[str, Any]: ...


def create_app(context: Context, batches: BatchStore | None) -> FastAPI:
    """The public application; without a store it has no files and no batches."""
    app = FastAPI(title="Slipway serving", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, context=context)
    _add_probes(app, context)
    _add_models(app, context)
    _add_generation(app, context)
    _add_text(app, context)
    add_chat_page(app, context)
    if batches is not None:
        add_batches(app, batches)
    _add_errors(app, context)
    install(app, BODIES, secured=context.keys is not None)
    return app


def metrics_text(context: Context) -> bytes:
    host = context.host
    return host.metrics.render(
        engines=host.engines, ready=context.unready() is None, memory=context.memory, sessions=context.sessions
    )


def _add_probes(app: FastAPI, context: Context) -> None:
    host = context.host

    @app.get("/health/live", responses={200: answers.of(answers.HEALTH)})
    async def live() -> JSONResponse:
        return JSONResponse({"status": "live"})

    @app.get("/health/ready", responses={200: answers.of(answers.HEALTH), 503: answers.of(answers.HEALTH)})
    async def ready() -> JSONResponse:
        """200 only when a request would be answered now."""
        why = context.unready()
        if why is not None:
            return JSONResponse(why, status_code=503)
        assert host.current is not None
        return JSONResponse({"status": "ready", "model": host.name, "digest": host.current.package.digest})

    @app.get("/metrics", response_class=PlainTextResponse, responses=documented(401))
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics_text(context), media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, context: Context) -> None:
    host = context.host

    def describe() -> dict[str, dict[str, Any]]:
        """The model and its adapters, by the names that requests give them; empty while there is no model."""
        served = host.current
        if served is None:
            return {}
        shared = {"object": "model", "owned_by": "slipway", "max_model_len": served.max_model_len}
        found: list[tuple[str, int, str | None, str | None]] = [
            (host.name, served.created_s, served.package.digest, None)
        ]
        for name, adapter in sorted(host.adapters.ready.items()):
            found.append((name, adapter.created_s, adapter.package.digest, host.name))
        return {
            name: {"id": name, "created": created_s, "digest": digest, "parent": parent, **shared}
            for name, created_s, digest, parent in found
        }

    @app.get("/v1/models", responses={200: answers.of(answers.MODELS), **documented(401, 503)})
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [*describe().values()]})

    @app.get(
        "/v1/models/{model:path}",
        responses={200: answers.of(answers.MODEL), **documented(401, 404, 503)},
        openapi_extra=path_parameter("model"),
    )
    async def model(request: Request) -> JSONResponse:
        name = request.path_params["model"]
        described = describe().get(name)
        if described is None:
            raise ApiError(404, f"The model '{name[:200]}' does not exist", param="model", code="model_not_found")
        return JSONResponse(described)


def _add_generation(app: FastAPI, context: Context) -> None:
    @app.post(
        "/v1/completions",
        responses={200: answers.of(answers.COMPLETION, stream=True), **ASK_ERRORS},
        openapi_extra=takes(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        body = await _read(context, CompletionRequest, request)
        answer = await Completion.start(context, body, Caller.of(request))
        return await _answer(request, answer, answer.events if body.stream else None)

    @app.post(
        "/v1/chat/completions",
        responses={200: answers.of(answers.CHAT, stream=True), **ASK_ERRORS},
        openapi_extra=takes(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        body = await _read(context, ChatRequest, request)
        answer = await Chat.start(context, body, Caller.of(request))
        return await _answer(request, answer, answer.events if body.stream else None)

    @app.post(
        "/v1/embeddings",
        responses={200: answers.of(answers.EMBEDDINGS), **ASK_ERRORS},
        openapi_extra=takes(EmbeddingRequest),
    )
    async def embeddings(request: Request) -> Response:
        body = await _read(context, EmbeddingRequest, request)
        return await _answer(request, await Embeddings.start(context, body, Caller.of(request)), None)


def _add_text(app: FastAPI, context: Context) -> None:
    errors = documented(400, 401, 404, 408, 413, 429, 503)

    @app.post(
        "/v1/tokenize", responses={200: answers.of(answers.TOKENS), **errors}, openapi_extra=takes(TokenizeRequest)
    )
    async def _tokenize(request: Request) -> JSONResponse:
        take_quota(Caller.of(request))
        return JSONResponse(await tokenize(context, await _read(context, TokenizeRequest, request)))

    @app.post(
        "/v1/detokenize", responses={200: answers.of(answers.TEXT), **errors}, openapi_extra=takes(DetokenizeRequest)
    )
    async def _detokenize(request: Request) -> JSONResponse:
        take_quota(Caller.of(request))
        return JSONResponse(await detokenize(context, await _read(context, DetokenizeRequest, request)))


async def _read(context: Context, kind: type[R], request: Request) -> R:
    """The request's body. Raises `ApiError`, for one that the queue could never hold before it is read."""
    served = context.host.current
    tokens = max(context.settings.max_queued_tokens, served.max_model_len if served is not None else 0)
    limit_bytes = max(LEAST_BODY_LIMIT_BYTES, BYTES_PER_TOKEN * tokens)
    return await context.clerk.read(kind, await read_body(request, limit_bytes=limit_bytes, timeout_s=BODY_TIMEOUT_S))


async def _answer(request: Request, answer: Answer, events: Callable[[], Any] | None) -> Response:
    """The answer, as a stream of `events` when they are asked for. Either ends when the client leaves."""
    generation = answer.generation
    quota = generation.caller.quota
    headers = quota.headers() if quota is not None else {}
    streaming = False
    try:
        if events is None:
            return JSONResponse(await until_disconnect(answer.whole(), request.receive), headers=headers)
        if generation.structured:
            await until_disconnect(generation.peek(), request.receive)
        streaming = True  # from here on the stream closes the generation
        return EventStream(events(), head=answer.head, on_close=generation.close, headers=headers)
    finally:
        if not streaming:
            generation.close()


def _add_errors(app: FastAPI, context: Context) -> None:
    requests = context.host.metrics.requests
    outcomes = {429: "rejected", 503: "unavailable"}
    counted = ("engine_failed", "deadline_exceeded", "invalid_structure", "unsupported")  # by their generation

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        if request.method == "POST" and error.code not in counted:
            requests.labels(outcomes.get(error.status, "invalid")).inc()
        return error.response()

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientGone, no_answer)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        requests.labels("error").inc()
        caller: Caller = request.scope["caller"]
        logs.event("error", level="error", message=f"{type(error).__name__}: {error}", id=caller.request_id)
        told = {"x-request-id": caller.request_id}  # by this the log is searched; the gate has been left
        return ApiError(500, "The server failed to answer; its log has the reason", headers=told).response()
