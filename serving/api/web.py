"""The chat page at `/`: its files, and the session behind it (log in with an API key, log out, history)."""

import re
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from serving.api import answers
from serving.api.context import Context
from serving.api.document import path_parameter, takes
from serving.api.errors import ApiError, documented
from serving.api.gate import COOKIE, same_origin, session_token, store_away
from serving.api.protocol import parse
from serving.api.sse import read_body
from serving.sessions import SESSION_TTL_S, StoreError, owner_of

FILES = {"index.html": "text/html", "chat.js": "text/javascript", "chat.css": "text/css"}
ROOT = Path(__file__).parents[1] / "web"
CONVERSATION_LIMIT_BYTES = 256 << 10
CONVERSATION_ID = "^[A-Za-z0-9-]{1,64}$"
HEADERS = {
    # Nothing from elsewhere runs or is loaded here, and what a model writes is shown as text, never as a page.
    "content-security-policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Login(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    key: Annotated[str, Field(min_length=1, max_length=500)]


class Turn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=CONVERSATION_LIMIT_BYTES)]


class Conversation(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    title: Annotated[str, Field(max_length=200)]
    messages: Annotated[list[Turn], Field(max_length=1000)]


def add_chat_page(app: FastAPI, context: Context) -> None:
    _add_files(app)
    _add_session(app, context)
    _add_history(app, context)

    @app.exception_handler(StoreError)
    async def away(_request: Request, error: StoreError) -> JSONResponse:
        return store_away(error).response()


def _add_files(app: FastAPI) -> None:
    def send(name: str) -> FileResponse:
        return FileResponse(ROOT / name, media_type=FILES[name], headers=HEADERS)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return send("index.html")

    @app.get("/web/files/{name}", include_in_schema=False)
    async def file(name: str) -> FileResponse:
        if name not in FILES:
            raise ApiError(404, "There is no such file", code="not_found")
        return send(name)


def _add_session(app: FastAPI, context: Context) -> None:
    @app.get("/web/session", responses={200: answers.of(answers.SESSION), **documented(503)})
    async def session(request: Request) -> Response:
        """Who is logged in, and what the page needs to know of the server."""
        user = await _user(context, request)
        return JSONResponse(
            {"user": user or None, "login_required": context.keys is not None, "model": context.host.name}
        )

    errors = documented(400, 401, 403, 408, 413, 503)

    @app.post("/web/login", responses={200: answers.of(answers.SESSION), **errors}, openapi_extra=takes(Login))
    async def login(request: Request) -> Response:
        _same_origin(request)
        body = parse(Login, await read_body(request, limit_bytes=4096, timeout_s=10))
        key = context.keys.find(body.key) if context.keys is not None else None
        if key is None:
            raise ApiError(401, "This key is not known here", param="key", code="invalid_api_key")
        token = await context.sessions.open(key.name)
        response = JSONResponse({"user": key.name, "login_required": True, "model": context.host.name})
        _set_cookie(request, response, token)
        return response

    @app.post("/web/logout", status_code=204, responses=documented(403, 503))
    async def logout(request: Request) -> Response:
        """Ends the session in the store too: the cookie is worth nothing afterwards, wherever a copy of it is."""
        _same_origin(request)
        await context.sessions.end(session_token(request.headers))
        response = Response(status_code=204)
        response.delete_cookie(COOKIE)
        return response


def _add_history(app: FastAPI, context: Context) -> None:
    errors = documented(401, 403, 503)
    one = path_parameter("conversation", pattern=CONVERSATION_ID)

    @app.get("/web/conversations", responses={200: answers.of(answers.CONVERSATIONS), **errors})
    async def conversations(request: Request) -> Response:
        owner = await _owner(context, request)
        return JSONResponse({"conversations": await context.sessions.conversations(owner) if owner else []})

    @app.put(
        "/web/conversations/{conversation}", status_code=204,
        responses={**errors, **documented(400, 408, 413)}, openapi_extra={**takes(Conversation), **one},
    )  # fmt: skip
    async def keep(request: Request) -> Response:
        """Stores a conversation. A browser without a session gets one, so that the next visit finds it."""
        _same_origin(request)
        owner = await _owner(context, request)
        name = _conversation_id(request)
        body = parse(Conversation, await read_body(request, limit_bytes=CONVERSATION_LIMIT_BYTES, timeout_s=10))
        response = Response(status_code=204)
        if owner is None:
            token = await context.sessions.open("")
            _set_cookie(request, response, token)
            owner = owner_of("", token)
        await context.sessions.keep(owner, {"id": name, **body.model_dump()})
        return response

    @app.delete(
        "/web/conversations/{conversation}", status_code=204,
        responses={**errors, **documented(400)}, openapi_extra=one,
    )  # fmt: skip
    async def forget(request: Request) -> Response:
        _same_origin(request)
        owner = await _owner(context, request)
        name = _conversation_id(request)
        if owner is not None:
            await context.sessions.forget(owner, name)
        return Response(status_code=204)


async def _user(context: Context, request: Request) -> str | None:
    """The session's user: a key's name, "" in a session without one, None without a session."""
    user = await context.sessions.user(session_token(request.headers))
    if user is None or (context.keys is not None and context.keys.named(user) is None):
        return None  # also when the key has been withdrawn since
    return user


async def _owner(context: Context, request: Request) -> str | None:
    """Whose history it is; None for a browser without a session. Raises `ApiError` where one must log in."""
    user = await _user(context, request)
    if user is None:
        if context.keys is not None:
            raise ApiError(401, "Log in first", code="not_logged_in")
        return None
    return owner_of(user, session_token(request.headers))


def _conversation_id(request: Request) -> str:
    name = request.path_params["conversation"]
    if not re.fullmatch(CONVERSATION_ID, name):
        raise ApiError(400, "A conversation's id is 1 to 64 letters, digits and '-'", param="conversation")
    return name


def _same_origin(request: Request) -> None:
    if not same_origin(request.headers):
        raise ApiError(403, "Another site's page may not do this", code="cross_origin")


def _set_cookie(request: Request, response: Response, token: str) -> None:
    secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"
    response.set_cookie(COOKIE, token, max_age=SESSION_TTL_S, httponly=True, samesite="strict", secure=secure)
