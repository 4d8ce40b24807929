"""The admin port, loopback unless told otherwise: what the server is doing, and the levers that operators need.

It asks for no key, so whoever reaches it may use it. `/metrics` is here too, for a scraper that has no key.
"""

import asyncio
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from serving.api.app import is_ready
from serving.api.context import Context


def create_admin(context: Context, stop: asyncio.Event) -> FastAPI:
    """The admin application; `stop` is set to drain and end the process, as SIGTERM does."""
    app = FastAPI(title="Slipway serving: admin", version="1", docs_url=None, redoc_url=None)
    host = context.host

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
        return {
            "model": host.name,
            "digest": host.current.package.digest if host.current is not None else None,
            "ready": is_ready(context),
            "why_not_ready": None if host.current is not None else host.why_not_ready,
            "draining": context.lifecycle.draining,
            "active_requests": context.lifecycle.active,
            "memory": {"free_bytes": context.memory.free_bytes, "short": context.memory.look()},
            "engines": engines,
        }

    @app.post("/drain", status_code=202)
    async def drain() -> JSONResponse:
        """Refuse new requests, finish those accepted, and exit: what SIGTERM does."""
        stop.set()
        return JSONResponse({"draining": True}, status_code=202)

    @app.post("/reload", status_code=202)
    async def reload() -> JSONResponse:
        """Read the channel now, also when what it points at was refused before."""
        host.look_now()
        return JSONResponse({"reloading": True}, status_code=202)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        text = host.metrics.render(engines=host.engines, ready=is_ready(context), memory=context.memory)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)

    return app
