"""The adapters that requests may name as their model: fetched, held against the model, followed in their channels.

What is wrong with one is said once, and its name is then answered with that; the model and the others go on. The engine
reads an adapter when the first request needs it (engine/adapters.py).
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from serving import logs
from serving.engine.background import off_loop
from serving.engine.messages import AdapterRef
from serving.errors import Refused
from serving.model.adapter import CONFIG, read_adapter
from serving.model.config import ModelConfig
from serving.package import Channel, Package, fetch, resolve
from serving.settings import ADAPTER_NAME, Settings


class Adapter(NamedTuple):
    """One that answers now."""

    package: Package
    ref: AdapterRef
    created_s: int


class AdapterShelf:
    def __init__(self, settings: Settings, *, model: str, on_gone: Callable[[AdapterRef], None]) -> None:
        """`on_gone` hears of what is served no more. Raises `Refused` for a source or a name that cannot be."""
        self._model, self._poll_s, self._on_gone = model, settings.poll_s, on_gone
        self._engine = settings.engine
        self._config: ModelConfig | None = None  # of the model that is served; None while there is none
        self._sources: dict[str, Package | Channel] = {}
        self._tried: dict[str, Package | None] = {}  # not tried again: the same bytes would be refused again
        self.ready: dict[str, Adapter] = {}
        self.refused: dict[str, str] = {}  # name → why
        for name, source in _named(settings):
            if name in self._sources:
                raise Refused(f"two adapters are named '{name}'", where="--adapter", fix="Name one of them otherwise")
            self._sources[name] = self._resolve(name, source)

    async def fit(self, config: ModelConfig) -> None:
        """Holds every adapter against a model that is about to be served."""
        self._config = config
        self._tried.clear()
        for name, source in [*self._sources.items()]:
            if await self._bring(name, source):
                self._take_off(name)

    async def follow(self) -> None:
        """Reads the adapters' channels for ever. A new one that is refused leaves the old one as it is."""
        while True:
            await asyncio.sleep(self._poll_s)
            for name, source in [*self._sources.items()]:
                if isinstance(source, Channel) and self._config is not None:
                    await self._bring(name, source)

    async def put(self, name: str, source: str) -> str | None:
        """Adds an adapter, or puts it in the place of another. Returns what is wrong with it; nothing is changed then.

        Raises `Refused` for a source or a name that cannot be. While there is no model everything is taken.
        """
        before = self._sources.get(name)
        self._sources[name] = found = self._resolve(name, source)
        self._tried.pop(name, None)
        wrong = await self._bring(name, found) if self._config is not None else None
        if wrong and before is not None:
            self._sources[name] = before
            self.refused.pop(name, None)
        elif wrong:
            self.remove(name)
        return wrong

    def remove(self, name: str) -> None:
        """Takes a name off; requests that have it go on. Raises `KeyError`."""
        del self._sources[name]
        self._tried.pop(name, None)
        self.refused.pop(name, None)
        self._take_off(name)

    async def _bring(self, name: str, source: Package | Channel) -> str | None:
        """Makes ready what the source holds now, unless that was tried before. Returns, and notes, what is wrong with it."""
        assert self._config is not None
        try:
            package = await off_loop(source.read) if isinstance(source, Channel) else source
            if name in self._tried and self._tried[name] == package:
                return None
            self._tried[name] = package
            if package is None:
                raise Refused("there is no adapter yet", where=source.url, fix="Publish one to the channel")
            adapter = await off_loop(partial(_read, package, self._config))
        except (Refused, OSError) as error:
            if self._sources.get(name) is source and self.refused.get(name) != str(error):
                logs.event("error", level="error", message=f"adapter '{name}': {error}")
                self.refused[name] = str(error)
            return str(error)
        if self._sources.get(name) is source:  # it was not taken off, or replaced, in the meantime
            self._take_off(name, but=adapter.ref)
            self.ready[name] = adapter
            self.refused.pop(name, None)
            logs.event("adapter", adapter=name, digest=adapter.package.digest or adapter.ref.digest)
        return None

    def _take_off(self, name: str, *, but: AdapterRef | None = None) -> None:
        old = self.ready.pop(name, None)
        if old is not None and old.ref != but:
            self._on_gone(old.ref)

    def _resolve(self, name: str, source: str) -> Package | Channel:
        if self._engine == "onnx":
            raise Refused("an ONNX graph takes no adapters", where=name, fix="Serve with --engine torch")
        if name == self._model or not ADAPTER_NAME.fullmatch(name):
            what = f"an adapter cannot be named '{name[:200]}'"
            raise Refused(what, where=source, fix=f"Use letters, digits, '.', '_' and '-', and not '{self._model}'")
        return resolve(source, holds=CONFIG)


def _named(settings: Settings) -> list[tuple[str, str]]:
    """(name, source) of each adapter that the settings name."""
    pairs = [(name, source) for name, _, source in (text.partition("=") for text in settings.adapters)]
    if settings.adapters_dir is None:
        return pairs
    root = Path(settings.adapters_dir)
    if not root.is_dir():
        raise Refused("there is no such directory", where=f"--adapters-dir {root}", fix="Create it, or leave it out")
    return pairs + [(path.parent.name, str(path.parent)) for path in sorted(root.glob(f"*/{CONFIG}"))]


def _read(package: Package, config: ModelConfig) -> Adapter:
    root = fetch(package, on_bytes=lambda *_: None)
    file = read_adapter(root, config)
    return Adapter(package, AdapterRef(file.digest, root, file.num_values), int(time.time()))
