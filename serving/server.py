"""The process: listens at once, loads in the background, drains on SIGTERM. Everything runs on one event loop."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from serving import logs
from serving.api.admin import create_admin
from serving.api.app import create_app
from serving.api.batches import open_store, runner
from serving.api.context import Context, Lifecycle
from serving.auth import Keys
from serving.connections import Doorstep
from serving.engine.client import EngineError
from serving.errors import Refused
from serving.host import ModelHost
from serving.metrics import Metrics
from serving.package import Channel, Package
from serving.pressure import MemoryWatch
from serving.sessions import Sessions
from serving.settings import Settings
from serving.tracing import Spans

BACKLOG = 2048
KEEP_ALIVE_S = 3660  # above a proxy's idle limit (Envoy: an hour), so that no request meets a connection being closed
FLUSH_S = 2  # for the last bytes of answers, once the drain is over


class Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handling: it closes its socket at once, and our drain must still answer 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int, *, prefix: str) -> socket.socket:
    """A listening socket. Raises `Refused` when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        fix = f"Choose another --{prefix}port or --{prefix}host"
        raise Refused(f"cannot listen: {error.strerror or error}", where=f"{host}:{port}", fix=fix) from None
    return sock


class Sockets:
    """The addresses that a server listens at, taken before anything is loaded."""

    def __init__(self, settings: Settings) -> None:
        self.public = listen(settings.host, settings.port, prefix="")
        has_admin = settings.admin_port is not None
        self.admin = listen(settings.admin_host, settings.admin_port or 0, prefix="admin-") if has_admin else None


def context_of(source: Package | Channel, settings: Settings) -> Context:
    """Everything that the routes share. Raises `Refused` for what the settings name and cannot be had."""
    return Context(
        host=ModelHost(source, settings, Metrics()),
        settings=settings,
        lifecycle=Lifecycle(),
        sessions=Sessions.at(settings.session_store),
        memory=MemoryWatch(settings.min_free_bytes),
        keys=Keys(Path(settings.api_keys)) if settings.api_keys is not None else None,
        spans=Spans.from_environment(),
    )


async def serve(source: Package | Channel, settings: Settings, sockets: Sockets) -> int:
    """Serves until a signal or a failure. Returns the exit code: 0 after a whole drain, 1 after a cut one."""
    _allow_many_connections()
    context = context_of(source, settings)
    host, lifecycle = context.host, context.lifecycle
    stop = asyncio.Event()
    _handle_signals(stop, host)
    batches = open_store(settings.files_dir) if settings.files_dir is not None else None
    servers = [_web_server(create_app(context, batches))]
    webs = [asyncio.create_task(servers[0].serve(sockets=[sockets.public]))]
    if sockets.admin is not None:
        servers.append(_web_server(create_admin(context, stop)))
        webs.append(asyncio.create_task(servers[1].serve(sockets=[sockets.admin])))
        logs.event("admin", host=settings.admin_host, port=sockets.admin.getsockname()[1])
    model = asyncio.create_task(host.run())
    work = [asyncio.create_task(host.adapters.follow())]
    if batches is not None:
        work.append(asyncio.create_task(runner(context, batches).run()))
    stopping = asyncio.create_task(stop.wait())
    logs.event("listening", host=settings.host, port=sockets.public.getsockname()[1], model=host.name)
    try:
        await _until_stop(stopping, model, host)
        await _cancel(work)  # what has no answer yet is for whoever runs next
        cut = await _drain(lifecycle, settings)
    finally:
        await _cancel(work)
        lifecycle.leaving = lifecycle.draining = True
        model.cancel()
        stopping.cancel()
        await host.stop()  # streams that outlasted the drain end here, with an error event that says so
        for server in servers:
            server.should_exit = True
        await asyncio.wait([*webs, model, stopping])
        await context.sessions.close()
        context.clerk.close()
        if context.spans is not None:
            await asyncio.to_thread(context.spans.close)
    return 1 if cut else 0


async def _cancel(tasks: "list[asyncio.Task[None]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _web_server(app: ASGIApp) -> Uvicorn:
    return Uvicorn(
        uvicorn.Config(
            app,
            http=Doorstep,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FLUSH_S,
        )
    )


def _allow_many_connections() -> None:
    """As many open files as this user may have: each stream is one, and the usual 1,024 are fewer than a node serves."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _until_stop(stopping: "asyncio.Task[bool]", model: "asyncio.Task[None]", host: ModelHost) -> None:
    """Returns when a signal asks to stop. Raises what the model's loading raised, or `EngineError` when it died."""
    waiting: set[asyncio.Future] = {stopping, model, host.failed}
    while not stopping.done():
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if host.failed.done():
            raise EngineError(host.failed.result())
        if model.done():
            model.result()
            waiting.discard(model)


async def _drain(lifecycle: Lifecycle, settings: Settings) -> int:
    """Says that it is not ready, refuses what comes once that can be known, and waits for what was accepted.

    Returns how many were still open after `--drain-s`.
    """
    lifecycle.leaving = True
    logs.event("leaving", refuses_in_s=settings.linger_s)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(lifecycle.at_once.wait(), timeout=settings.linger_s)
    lifecycle.draining = True
    logs.event("draining", active=lifecycle.active)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(lifecycle.idle.wait(), timeout=settings.drain_s)
    logs.event("drained", cut=lifecycle.active)
    return lifecycle.active


def _handle_signals(stop: asyncio.Event, host: ModelHost) -> None:
    def on_signal() -> None:
        if stop.is_set():  # asked twice: whoever asks will not wait for streams
            for engine in host.engines:
                engine.kill()
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
