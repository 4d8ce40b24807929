"""Keeps the server's model current: loads it, follows its channel, and swaps without a request noticing.

waiting (no channel file) → loading → serving, and from there loading the next one beside it → serving that.
While nothing is to be served nothing is loaded, not even torch: training may be running on the same machine.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from serving import logs
from serving.adapters import AdapterShelf
from serving.chat_template import ChatTemplate
from serving.engine.background import off_loop
from serving.engine.client import EngineError, EngineProcess
from serving.engine.messages import AdapterRef
from serving.errors import Refused
from serving.memory import available_bytes
from serving.metrics import Metrics
from serving.model.config import ModelConfig
from serving.package import Channel, Package, fetch
from serving.settings import Settings
from serving.tokenizer import Tokenizer

RETRY_MAX_S = 60.0


@dataclass(frozen=True)
class Served:
    """A model that answers now."""

    package: Package
    root: Path  # where its files are on this machine
    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    engine: EngineProcess
    max_model_len: int
    vocab_size: int
    created_s: int
    adapter: AdapterRef | None = None  # what `name` stands for, where it is not the model itself


class ModelHost:
    def __init__(self, source: Package | Channel, settings: Settings, metrics: Metrics) -> None:
        self.source, self.settings, self.metrics = source, settings, metrics
        self.name = settings.served_name or source.name
        self.current: Served | None = None
        self.why_not_ready = "the model is loading"  # or why one that is newer is not served; empty when all is well
        self._asked = asyncio.Event()
        self._retiring: set[asyncio.Task[None]] = set()
        self._engines: list[EngineProcess] = []
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.adapters = AdapterShelf(settings, model=self.name, on_gone=self._forget)

    @property
    def engines(self) -> list[EngineProcess]:
        return self._engines

    async def run(self) -> None:
        """Serves the source until cancelled. Raises `Refused` or `EngineError` when a fixed package can't be loaded."""
        if isinstance(self.source, Package):
            await self._swap(self.source)
        else:
            await self._follow(self.source)

    async def stop(self) -> None:
        """Ends every engine, at once."""
        self.current = None
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*(engine.stop() for engine in self._engines))

    def look_now(self) -> None:
        """Reads the channel at once, and tries again what it refused. A fixed package has nothing to be read again."""
        self._asked.set()

    async def _follow(self, channel: Channel) -> None:
        """Reads the channel for ever. What goes wrong is said once, and leaves what is served as it is."""
        refused: Package | None = None  # not tried again: the same bytes would be refused again
        said = ""
        retry_s = self.settings.poll_s
        while True:
            delay_s = self.settings.poll_s
            package: Package | None = None
            try:
                package = await off_loop(channel.read)
                if package is None and self.current is None:
                    self.why_not_ready = f"there is no model in the channel yet ({channel.url})"
                    said = _say_once("waiting", self.why_not_ready, said)
                elif package is not None and package != refused and package != self._package:
                    await self._swap(package)
                    retry_s, refused, said = self.settings.poll_s, None, ""
                elif package is not None and package == self._package:  # again, perhaps: a release was taken back
                    self.why_not_ready, refused, said = "", None, ""
            except Refused as error:
                refused = package
                self.why_not_ready = str(error)
                said = _say_once("error", str(error), said)
            except (EngineError, OSError) as error:
                self.why_not_ready = f"the model could not be loaded: {error}"
                said = _say_once("error", self.why_not_ready, said)
                delay_s = retry_s = min(2 * retry_s, RETRY_MAX_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), delay_s)
                self._asked.clear()
                refused = None

    @property
    def _package(self) -> Package | None:
        return self.current.package if self.current is not None else None

    async def _swap(self, package: Package) -> None:
        """Loads `package` beside what is served now, and then sends new requests to it; those in flight stay."""
        started_s = time.monotonic()
        if self.current is None:
            self.why_not_ready = "the model is loading"
        checking = logs.Progress("load", unit="bytes checked")
        root = await off_loop(partial(fetch, package, on_bytes=checking.update))
        self.metrics.load.labels("check").set(time.monotonic() - started_s)
        if self.current is not None:
            self._check_memory(root, beside=self.current)
        served = await self._load(package, root)
        await self.adapters.fit(ModelConfig.read(root / "config.json"))
        old, self.current, self.why_not_ready = self.current, served, ""
        if old is not None:
            self.metrics.swaps.inc()
            self.metrics.model_info.remove(_digest_label(old.package))
            task = asyncio.create_task(self._retire(old))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        self.metrics.model_info.labels(_digest_label(package)).set(1)
        logs.event("done", stage="load", seconds=round(time.monotonic() - started_s, 2), skipped=False)
        logs.event("serving", model=self.name, digest=package.digest, max_model_len=served.max_model_len)

    def _check_memory(self, root: Path, *, beside: Served) -> None:
        """Raises `EngineError` when a second model would take memory that the first one's streams need.

        It takes as much as the first, but for the weights. The channel is then tried again later: memory comes back
        when answers end, and a restart loads the new one.
        """
        need = beside.engine.resident_bytes + _weights_bytes(root) - _weights_bytes(beside.root)
        free = available_bytes() - self.settings.min_free_bytes
        if need > free:
            raise EngineError(f"the new model needs {need:,} bytes beside the old one, and {free:,} are free")

    async def _load(self, package: Package, root: Path) -> Served:
        tokenizer = await asyncio.to_thread(Tokenizer, root)
        chat_template = ChatTemplate.read(root)
        stages = LoadStages(self.metrics)
        engine = await EngineProcess.start(root, self.settings, on_bytes=stages.on_bytes)
        stages.finish("first_token")
        self._engines.append(engine)
        ready = engine.ready
        assert ready is not None
        engine.died.add_done_callback(lambda died: self._on_death(engine, died.result()))
        return Served(
            package=package,
            root=root,
            name=self.name,
            tokenizer=tokenizer,
            chat_template=chat_template,
            engine=engine,
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            created_s=int(time.time()),
        )

    async def _retire(self, old: Served) -> None:
        await old.engine.drained()
        await old.engine.stop()
        self._engines.remove(old.engine)
        self.metrics.engine.retire(old.engine)
        logs.event("retired", model=old.name, digest=old.package.digest)

    def _forget(self, adapter: AdapterRef) -> None:
        for engine in self._engines:
            engine.forget(adapter)

    def _on_death(self, engine: EngineProcess, why: str) -> None:
        """An engine that serves and ends by itself ends the server: who runs it (Kubernetes) knows how to start it."""
        if self.current is not None and self.current.engine is engine and not self.failed.done():
            self.current = None
            self.why_not_ready = why
            self.failed.set_result(why)


class LoadStages:
    """Times the stages of a load as the engine's own messages tell of them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._progress = logs.Progress("load", unit="bytes")
        self._stage, self._since_s = "start", time.monotonic()

    def on_bytes(self, done: int, total: int) -> None:
        if self._stage == "start":
            self.finish("start")
            self._stage = "weights"
        if done >= total and self._stage == "weights":
            self.finish("weights")
            self._stage = "first_token"
        self._progress.update(done, total)

    def finish(self, stage: str) -> None:
        now_s = time.monotonic()
        self._metrics.load.labels(stage).set(now_s - self._since_s)
        self._since_s = now_s


def _say_once(name: str, message: str, said: str) -> str:
    if message != said:
        logs.event(name, message=message, level="error" if name == "error" else "info")
    return message


def _weights_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("*.safetensors"))


def _digest_label(package: Package) -> str:
    return package.digest or "none"
