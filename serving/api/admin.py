"""The admin port, loopback unless told otherwise: what the server is doing, and the levers that operators need.

It asks for no key, so whoever reaches it may use it. `/metrics` is here too, for a scraper that has no key.
"""

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from serving.api.app import metrics_text
from serving.api.context import Context
from serving.api.document import takes
from serving.api.errors import ApiError, bad_request, http_error
from serving.api.protocol import Strict, parse
from serving.api.sse import ClientGone, no_answer, read_body
from serving.errors import Refused

BODY_LIMIT_BYTES = 64 << 10


class AdapterSource(Strict):
    """A directory in PEFT's layout, a registry entry, or a channel file."""

    source: str


def create_admin(context: Context, stop: asyncio.Event) -> FastAPI:
    """The admin application; `stop` is set to drain and end the process."""
    app = FastAPI(title="Slipway serving: admin", version="1", docs_url=None, redoc_url=None)
    host = context.host
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientGone, no_answer)

    @app.exception_handler(ApiError)
    async def refused(_request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.get("/status")
    async def status() -> dict[str, Any]:
        """What is served, by which engines, and how full they are."""
        engines = [
            {
                "running": engine.running, "waiting": engine.waiting, "in_flight": engine.in_flight,
                "queued_tokens": engine.queued_tokens, "kv_used_ratio": engine.kv_used_ratio,
                **engine.counters._asdict(),
            }
            for engine in host.engines
        ]  # fmt: skip
        why = context.unready()
        return {
            "model": host.name,
            "digest": host.current.package.digest if host.current is not None else None,
            "ready": why is None,
            "why_not_ready": why.get("why", why["status"]) if why is not None else None,
            "why_not_newer": (host.why_not_ready or None) if host.current is not None else None,
            "leaving": context.lifecycle.leaving,
            "draining": context.lifecycle.draining,
            "active_requests": context.lifecycle.active,
            "memory": {"free_bytes": context.memory.free_bytes, "short": context.memory.look()},
            "engines": engines,
        }

    @app.post("/drain", status_code=202)
    async def drain() -> JSONResponse:
        """Refuse new requests, finish those accepted, and exit: what SIGTERM does once `--linger-s` is over."""
        context.lifecycle.at_once.set()
        stop.set()
        return JSONResponse({"draining": True}, status_code=202)

    @app.post("/reload", status_code=202)
    async def reload() -> JSONResponse:
        """Read the channel now, also when what it points at was refused before."""
        host.look_now()
        return JSONResponse({"reloading": True}, status_code=202)

    @app.get("/adapters")
    async def adapters() -> dict[str, Any]:
        """The adapters that requests may name, and what is wrong with the others."""
        ready = {
            name: {"digest": adapter.package.digest or adapter.ref.digest, "source": adapter.package.url}
            for name, adapter in sorted(host.adapters.ready.items())
        }
        return {"ready": ready, "refused": host.adapters.refused}

    @app.put("/adapters/{name}", openapi_extra=takes(AdapterSource.model_json_schema()))
    async def put_adapter(name: str, request: Request) -> JSONResponse:
        """Serves the adapter from now on, in the place of another one of that name."""
        body = parse(AdapterSource, await read_body(request, limit_bytes=BODY_LIMIT_BYTES, timeout_s=30))
        try:
            wrong = await host.adapters.put(name, body.source)
        except Refused as error:
            wrong = str(error)
        if wrong:
            raise bad_request(wrong, param="source")
        return JSONResponse({"name": name})

    @app.delete("/adapters/{name}")
    async def remove_adapter(name: str) -> JSONResponse:
        """Serves it no more. Requests that have it are finished."""
        try:
            host.adapters.remove(name)
        except KeyError:
            raise ApiError(404, f"There is no adapter '{name[:200]}'", code="not_found") from None
        return JSONResponse({"name": name, "deleted": True})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics_text(context), media_type=CONTENT_TYPE_LATEST)

    return app
