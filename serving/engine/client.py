"""The server's side of the engine process: starts it, sends it sequences, and hands each answer to who waits for it."""

import asyncio
import itertools
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from serving.engine import child
from serving.engine.messages import (
    Abort,
    AdapterRef,
    Add,
    Counters,
    Failed,
    Forget,
    Load,
    Loading,
    Output,
    Ready,
    Reply,
    Request,
    SamplingParams,
    Step,
    Stop,
)
from serving.errors import Refused
from serving.memory import resident_bytes
from serving.settings import Settings

STOP_TIMEOUT_S = 5.0
RATE_WINDOW_S = 10.0


class EngineError(RuntimeError):
    """The engine process failed in a way that another try may survive."""


class Stream:
    """The outputs of one request's sequences as they come. `async for outputs in stream`, and then `close`."""

    def __init__(self, engine: "EngineProcess", seq_ids: range) -> None:
        self._engine = engine
        self._seq_ids = seq_ids
        self._open = set(seq_ids)
        self._arrived: list[Output] = []
        self._failure: EngineError | None = None
        self._news = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """All that has come since: (index of the sequence in the request, what it goes on with), until all are finished.

        A reader who is behind finds the outputs of several steps at once. Raises `EngineError`.
        """
        while self._open:
            await self._news.wait()
            self._news.clear()
            arrived, self._arrived = self._arrived, []
            self._open.difference_update(output.seq_id for output in arrived if output.finish_reason)
            if arrived:
                yield [(output.seq_id - self._seq_ids.start, output) for output in arrived]
            if self._failure is not None and self._open:
                raise self._failure

    def put(self, output: Output) -> None:
        self._arrived.append(output)
        self._news.set()

    def fail(self, failure: EngineError) -> None:
        """There will be no more. What has come before is still read."""
        self._failure = failure
        self._news.set()

    def close(self) -> None:
        """Aborts what has not finished, and frees its blocks. Closing a stream that has ended does nothing."""
        self._engine.release(self._seq_ids, unfinished=sorted(self._open))
        self._open.clear()


class EngineProcess:
    """One model in one process. Made by `start`; all methods belong to the event loop that started it."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self._process, self._connection = process, connection
        self._streams: dict[int, Stream] = {}
        self._ids = itertools.count()
        self._queued: dict[int, int] = {}  # sequences that have no token yet → the length of their prompts
        self._dequeued: deque[tuple[float, int]] = deque()  # (when, prompt tokens) that left the queue lately
        self._loaded: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ready: Ready | None = None
        self.running = self.waiting = 0
        self.kv_used_ratio = self.bandwidth_ratio = self.mfu_ratio = 0.0
        self.counters = Counters()
        self.queued_tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def start(cls, root: Path, settings: Settings, *, on_bytes: Callable[[int, int], None]) -> "EngineProcess":
        """Starts the process and returns once it has made a token. Raises `Refused` or `EngineError`."""
        engine = cls(*child.start("serving.engine.worker"))
        asyncio.get_running_loop().add_reader(engine._connection.fileno(), engine._receive, on_bytes)
        engine._send(Load(str(root), settings))
        try:
            engine.ready = await engine._loaded
        except BaseException:
            await engine.stop()
            raise
        return engine

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    @property
    def resident_bytes(self) -> int:
        return resident_bytes(self._process.pid)

    def submit(
        self, prompts: Sequence[tuple[list[int], SamplingParams]], *,
        priority: int = 0, tenant: str = "", adapter: AdapterRef | None = None,
    ) -> Stream:  # fmt: skip
        """Queues one request's sequences. They are answered together, each as `index` of the returned stream."""
        start = next(self._ids)
        for _ in prompts[1:]:
            next(self._ids)
        seq_ids = range(start, start + len(prompts))
        stream = Stream(self, seq_ids)
        arrived_s = time.monotonic()
        for seq_id, (prompt_ids, params) in zip(seq_ids, prompts, strict=True):
            self._streams[seq_id] = stream
            self._queued[seq_id] = len(prompt_ids)
            self.queued_tokens += len(prompt_ids)
            self._send(Add(seq_id, prompt_ids, params, arrived_s, priority, tenant, adapter))
        self._idle.clear()
        return stream

    def forget(self, adapter: AdapterRef) -> None:
        """The adapter is served no more. Sequences that have it go on."""
        self._send(Forget(adapter))

    def release(self, seq_ids: range, *, unfinished: list[int]) -> None:
        for seq_id in seq_ids:
            self._streams.pop(seq_id, None)
            self.queued_tokens -= self._queued.pop(seq_id, 0)
        if unfinished:
            self._send(Abort(unfinished))
        if not self._streams:
            self._idle.set()

    def dequeued_tokens_per_s(self) -> float:
        """How fast the queue has been getting shorter of late; at least one token a second."""
        since_s = time.monotonic() - RATE_WINDOW_S
        return max(1.0, sum(tokens for when_s, tokens in self._dequeued if when_s > since_s) / RATE_WINDOW_S)

    async def drained(self) -> None:
        """Returns when no stream is open."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Ends the process. Streams that are still open get an `EngineError`."""
        self._send(Stop())
        self._close("the engine was stopped")
        for _ in range(int(STOP_TIMEOUT_S / 0.02)):
            if self._process.poll() is not None:
                return
            await asyncio.sleep(0.02)
        self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        self._process.kill()

    def _send(self, message: Request) -> None:
        try:
            self._connection.send(message)
        except OSError:  # it is gone, or we hung up: the reader tells the streams, and there is nobody to abort for
            return

    def _receive(self, on_bytes: Callable[[int, int], None]) -> None:
        """One message. The engine writes whole messages at once, so waiting for the rest of one is no wait."""
        try:
            message: Reply = self._connection.recv()
        except (EOFError, OSError):
            # Reaped here, so that the reason can be told: a negative code is a signal, -9 most often memory.
            self._close(f"the engine process ended by itself (exit code {self._process.wait()})")
            return
        match message:
            case Step():
                self._deliver(message)
            case Loading(done, total):
                on_bytes(done, total)
            case Ready():
                self._loaded.set_result(message)
            case Failed(text, refused):
                if not self._loaded.done():
                    self._loaded.set_exception(Refused.repeated(text) if refused else EngineError(text))
                self._close(text)

    def _deliver(self, step: Step) -> None:
        self.running, self.waiting, self.kv_used_ratio = step.running, step.waiting, step.kv_used_ratio
        self.counters, self.bandwidth_ratio, self.mfu_ratio = step.counters, step.bandwidth_ratio, step.mfu_ratio
        for output in step.outputs:
            if output.queue_s is not None:
                self._dequeue(output.seq_id)
            stream = self._streams.get(output.seq_id)
            if stream is not None:
                stream.put(output)

    def _dequeue(self, seq_id: int) -> None:
        tokens = self._queued.pop(seq_id, 0)
        self.queued_tokens -= tokens
        self._dequeued.append((time.monotonic(), tokens))
        while self._dequeued[0][0] < self._dequeued[-1][0] - RATE_WINDOW_S:
            self._dequeued.popleft()

    def _close(self, why: str) -> None:
        """Stops listening, and tells everyone who waits."""
        if self.died.done():
            return
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self._connection.close()
        self.died.set_result(why)
        if not self._loaded.done():
            self._loaded.set_exception(EngineError(why))
        for stream in set(self._streams.values()):
            stream.fail(EngineError(why))
