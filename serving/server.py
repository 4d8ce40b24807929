"""The process: listens at once, loads in the background, drains on SIGTERM. Everything runs on one event loop."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn

from serving import logs
from serving.api.app import Lifecycle, create_app
from serving.engine.client import EngineError
from serving.errors import Refused
from serving.host import ModelHost
from serving.metrics import Metrics
from serving.package import Channel, Package
from serving.settings import Settings

BACKLOG = 2048
KEEP_ALIVE_S = 3660  # above a proxy's idle limit (Envoy: an hour), so that no request meets a connection being closed
FLUSH_S = 2  # for the last bytes of answers, once the drain is over


class Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handling: it closes its socket at once, and our drain must still answer 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(settings: Settings) -> socket.socket:
    """The listening socket. Raises `Refused` when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise Refused(
            f"cannot listen: {error.strerror or error}", where=where, fix="Choose another --port or --host"
        ) from None
    return sock


async def serve(source: Package | Channel, settings: Settings, sock: socket.socket) -> int:
    """Serves until a signal or a failure. Returns the exit code: 0 after a whole drain, 1 after a cut one."""
    host = ModelHost(source, settings, Metrics())
    lifecycle = Lifecycle()
    config = uvicorn.Config(
        create_app(host, lifecycle),
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=FLUSH_S,
    )
    server = Uvicorn(config)
    stop = asyncio.Event()
    _handle_signals(stop, host)
    web = asyncio.create_task(server.serve(sockets=[sock]))
    model = asyncio.create_task(host.run())
    stopping = asyncio.create_task(stop.wait())
    logs.event("listening", host=settings.host, port=sock.getsockname()[1], model=host.name)
    try:
        await _until_stop(stopping, model, host)
        cut = await _drain(lifecycle, settings)
    finally:
        lifecycle.draining = True
        model.cancel()
        stopping.cancel()
        await host.stop()  # streams that outlasted the drain end here, with an error event that says so
        server.should_exit = True
        await asyncio.gather(web, model, stopping, return_exceptions=True)
    return 1 if cut else 0


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
    """Refuses new requests and waits for those accepted. Returns how many were still open after `--drain-s`."""
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
