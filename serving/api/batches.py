"""`/v1/files` and `/v1/batches`: OpenAI's batch interface over a directory of this server's."""

import asyncio
import json
import re
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from serving.api import answers, pages
from serving.api.chat import Chat
from serving.api.completions import Completion
from serving.api.context import Caller, Context, caller_with
from serving.api.document import path_parameter, takes
from serving.api.embeddings import Embeddings
from serving.api.errors import ApiError, bad_request, documented
from serving.api.generation import take_quota
from serving.api.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, Strict, parse
from serving.api.sse import ClientGone, read_body
from serving.auth import PRIORITIES
from serving.batches import FINAL, Answered, Batch, BatchRunner, BatchStore
from serving.errors import Refused
from serving.files import File, FileStore

UPLOAD_LIMIT_BYTES = 200 << 20  # OpenAI's
UPLOAD_TIMEOUT_S = 600.0
BATCH_ID = re.compile(r"batch-[0-9a-f]{24}")
UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "const": "batch"}},
}
MOST_FILES, MOST_BATCHES, BATCHES_BY_DEFAULT = 10_000, 100, 20  # in a page: OpenAI's
PURPOSE = {"name": "purpose", "in": "query", "required": False, "schema": {"type": "string"}}
ERRORS = documented(400, 401, 404, 503)
R = TypeVar("R", ChatRequest, CompletionRequest)


class BatchRequest(Strict):
    input_file_id: Annotated[str, Field(max_length=100)]
    endpoint: Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
    completion_window: Literal["24h"] = "24h"  # what is promised to nobody in particular; batches run at once
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None


def open_store(files_dir: str) -> BatchStore:
    """Raises `Refused` when the directory cannot be written."""
    try:
        files = FileStore(Path(files_dir))
        (files.root / ".lock").touch()
    except OSError as error:
        fix = "Give a directory that this user may write"
        raise Refused(f"cannot keep files: {error.strerror}", where=f"--files-dir {files_dir}", fix=fix) from None
    return BatchStore(files)


def runner(context: Context, store: BatchStore) -> BatchRunner:
    """Answers the lines of batches as the routes would, behind everyone who waits."""

    async def answer(batch: Batch, endpoint: str, body: Any) -> Answered:
        request_id = uuid.uuid4().hex
        try:
            caller = _caller(context, batch, request_id)
        except ApiError as error:
            return error.status, request_id, error.body()
        return await ask(context, endpoint, body, caller)

    return BatchRunner(store, answer)


async def ask(context: Context, endpoint: str, body: Any, caller: Caller) -> Answered:
    """What the route `endpoint` answers to `body`, without a connection."""
    try:
        return 200, caller.request_id, await _answer(context, endpoint, json.dumps(body).encode(), caller)
    except ApiError as error:
        return error.status, caller.request_id, error.body()


def _caller(context: Context, batch: Batch, request_id: str) -> Caller:
    """The batch's owner, behind everyone who waits, on the quota of the key that made it. Raises `ApiError`."""
    if context.keys is None:
        return Caller(request_id, tenant=batch.owner, priority=PRIORITIES["batch"])
    key = context.keys.named(batch.key)
    if key is None:
        raise ApiError(401, "The key that made this batch has been withdrawn", code="invalid_api_key")
    return replace(caller_with(key, context, request_id=request_id), priority=PRIORITIES["batch"])


async def _answer(context: Context, endpoint: str, raw: bytes, caller: Caller) -> dict[str, Any]:
    if endpoint == "/v1/embeddings":
        answer = await Embeddings.start(context, await context.clerk.read(EmbeddingRequest, raw), caller)
    elif endpoint == "/v1/chat/completions":
        answer = await Chat.start(context, _unstreamed(await context.clerk.read(ChatRequest, raw)), caller)
    else:
        answer = await Completion.start(context, _unstreamed(await context.clerk.read(CompletionRequest, raw)), caller)
    try:
        return await answer.whole()
    finally:
        answer.generation.close()


def _unstreamed(request: R) -> R:
    if request.stream:
        raise bad_request("A batch has no streams; leave 'stream' out", param="stream")
    return request


def add_batches(app: FastAPI, store: BatchStore) -> None:
    _add_files(app, store.files)
    _add_batches(app, store)


def _add_files(app: FastAPI, files: FileStore) -> None:
    one = path_parameter("file_id")

    @app.post(
        "/v1/files",
        responses={200: answers.of(answers.FILE), **ERRORS, **documented(408, 413, 429)},
        openapi_extra=takes(UPLOAD, media_type="multipart/form-data"),
    )
    async def upload(request: Request) -> JSONResponse:
        take_quota(Caller.of(request))
        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                file = await _receive(request, files)
        except TimeoutError:
            raise ApiError(408, f"The upload did not come within {UPLOAD_TIMEOUT_S:g} seconds") from None
        return JSONResponse(file.body())

    @app.get(
        "/v1/files",
        responses={200: answers.of(answers.FILES), **ERRORS},
        openapi_extra={"parameters": [PURPOSE, *pages.parameters(most=MOST_FILES)]},
    )
    async def listed(request: Request) -> JSONResponse:
        found = await asyncio.to_thread(files.all, owner=Caller.of(request).tenant)
        purpose = request.query_params.get("purpose")
        bodies = [file.body() for file in found if purpose in (None, file.purpose)]
        return pages.page(request, bodies, most=MOST_FILES, default=MOST_FILES)

    @app.get("/v1/files/{file_id}", responses={200: answers.of(answers.FILE), **ERRORS}, openapi_extra=one)
    async def retrieve(request: Request) -> JSONResponse:
        return JSONResponse(_file(files, request).body())

    @app.get(
        "/v1/files/{file_id}/content",
        responses={200: {"description": "The bytes", "content": {"application/octet-stream": {}}}, **ERRORS},
        openapi_extra=one,
    )
    async def content(request: Request) -> Response:
        return FileResponse(files.data(_file(files, request).id), media_type="application/octet-stream")

    @app.delete("/v1/files/{file_id}", responses={200: answers.of(answers.DELETED), **ERRORS}, openapi_extra=one)
    async def delete(request: Request) -> JSONResponse:
        file = _file(files, request)
        files.remove(file)
        return JSONResponse({"id": file.id, "object": "file", "deleted": True})


def _add_batches(app: FastAPI, store: BatchStore) -> None:
    one = path_parameter("batch_id")

    @app.post(
        "/v1/batches",
        responses={200: answers.of(answers.BATCH), **ERRORS, **documented(408, 413, 429)},
        openapi_extra=takes(BatchRequest),
    )
    async def create(request: Request) -> JSONResponse:
        caller = Caller.of(request)
        take_quota(caller)
        body = parse(BatchRequest, await read_body(request, limit_bytes=64 << 10, timeout_s=30))
        if store.files.get(body.input_file_id, owner=caller.tenant) is None:
            raise ApiError(404, "There is no such file", param="input_file_id", code="not_found")
        batch = store.create(
            owner=caller.tenant,
            key=caller.name,
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            metadata=body.metadata,
        )
        return JSONResponse(batch.body())

    @app.get(
        "/v1/batches",
        responses={200: answers.of(answers.BATCHES), **ERRORS},
        openapi_extra={"parameters": pages.parameters(most=MOST_BATCHES)},
    )
    async def listed(request: Request) -> JSONResponse:
        owner = Caller.of(request).tenant
        found = [batch.body() for batch in await asyncio.to_thread(store.all) if batch.owner == owner]
        return pages.page(request, found, most=MOST_BATCHES, default=BATCHES_BY_DEFAULT)

    @app.get("/v1/batches/{batch_id}", responses={200: answers.of(answers.BATCH), **ERRORS}, openapi_extra=one)
    async def retrieve(request: Request) -> JSONResponse:
        return JSONResponse(_batch(store, request).body())

    @app.post(
        "/v1/batches/{batch_id}/cancel",
        responses={200: answers.of(answers.BATCH), **ERRORS, **documented(409)},
        openapi_extra=one,
    )
    async def cancel(request: Request) -> JSONResponse:
        batch = _batch(store, request)
        if batch.status in FINAL:
            raise ApiError(409, f"The batch is {batch.status} already", code="batch_ended")
        return JSONResponse(store.cancel(batch).body())


async def _receive(request: Request, files: FileStore) -> File:
    """Stores an uploaded file. Raises `ApiError` when it is too large, or no form with a file of purpose `batch`."""
    counting = Request(request.scope, _counted(request))
    try:
        async with counting.form(max_files=1, max_fields=8) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise bad_request("The form has no file", param="file")
            if form.get("purpose") != "batch":
                raise bad_request("'purpose' must be 'batch'", param="purpose")
            if unknown := sorted(set(form) - {"file", "purpose"}):
                raise bad_request(f"unknown field '{unknown[0][:100]}'", param=unknown[0][:100])
            return await asyncio.to_thread(
                files.add, file.file, owner=Caller.of(request).tenant, purpose="batch",
                filename=(file.filename or "upload.jsonl")[:200],
            )  # fmt: skip
    except (MultiPartException, HTTPException) as error:
        text = error.message if isinstance(error, MultiPartException) else error.detail
        raise bad_request(f"The form cannot be read: {text}") from None


def _counted(request: Request) -> Any:
    """The request's `receive`, which gives up at the limit instead of filling the disk."""
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        received += len(message.get("body", b""))
        if received > UPLOAD_LIMIT_BYTES:
            raise ApiError(413, f"The upload is larger than {UPLOAD_LIMIT_BYTES} bytes", code="request_too_large")
        return message

    return receive


def _file(files: FileStore, request: Request) -> File:
    file = files.get(request.path_params["file_id"], owner=Caller.of(request).tenant)
    if file is None:
        raise ApiError(404, "There is no such file", param="file_id", code="not_found")
    return file


def _batch(store: BatchStore, request: Request) -> Batch:
    batch_id = request.path_params["batch_id"]
    batch = store.get(batch_id) if BATCH_ID.fullmatch(batch_id) else None
    if batch is None or batch.owner != Caller.of(request).tenant:
        raise ApiError(404, "There is no such batch", param="batch_id", code="not_found")
    return batch
