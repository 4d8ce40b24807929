"""`python -m serving.offline MODEL --input URL --output URL`: answers a file of requests, in OpenAI's batch form, without a server.

One of `--shards` processes, each with a model of its own; whoever finishes last joins the answers, one for each line of
the input and in its order. Killed at any moment and started again, it goes on with the windows that have no answers.
Exit 0 done (also when there was nothing to do), 1 failed, 2 refused, 75 interrupted.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from itertools import islice
from typing import Any

from serving import logs, settings
from serving.api.batches import ask
from serving.api.context import Caller, Context
from serving.batches import line_answer, persist, request_of
from serving.engine.client import EngineError
from serving.errors import Refused
from serving.package import Package
from serving.pull import await_package
from serving.server import context_of
from serving.shards import Input, Line, Output, fingerprint

WINDOW_LINES = 64
INTERRUPTED = 75
AHEAD = 2
"""Lines that are begun, in times of what is answered at once: the last ones of a window must not leave the engine idle."""
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")


def parse(argv: list[str]) -> tuple[argparse.Namespace, settings.Settings]:
    """The batch's own flags, and the server's for the rest. Raises `Refused`."""
    p = settings.Parser("python -m serving.offline", description="Answers a file of requests.", allow_abbrev=False)
    p.add_argument("--input", required=True, metavar="URL", help="a JSONL file, a directory of them or a pattern")
    p.add_argument("--output", required=True, metavar="URL", help="a directory: answers.jsonl and summary.json")
    p.add_argument("--endpoint", choices=ENDPOINTS, default=ENDPOINTS[1])
    p.add_argument("--shards", type=int, default=1, metavar="N", help="processes that share the input")
    p.add_argument(
        "--shard", type=int, default=os.environ.get("JOB_COMPLETION_INDEX", "0"), metavar="K", help="0 to N-1"
    )
    p.add_argument("--window", type=int, default=WINDOW_LINES, metavar="LINES", help="lines that are written together")
    own, rest = p.parse_known_args(argv)
    if not 0 <= own.shard < own.shards:
        fix = "Give --shard from 0 to below --shards"
        raise Refused(f"there is no shard {own.shard} of {own.shards}", where="command line", fix=fix)
    if own.window < 1:
        raise Refused(f"a window of {own.window} lines is none", where="command line", fix="Give --window 64")
    return own, settings.parse(rest)


class Shard:
    """The work of one shard."""

    def __init__(self, own: argparse.Namespace, model: str) -> None:
        self.own = own
        self.source = Input(own.input)
        asked = fingerprint(self.source, endpoint=own.endpoint, model=model, shards=own.shards, window=own.window)
        self.output = Output(own.output, work=asked)
        self.about = {"work": asked, "model": model, "endpoint": own.endpoint, "shards": own.shards}

    @property
    def is_joined(self) -> bool:
        """The answers of all shards are there."""
        summary = self.output.summary()
        return summary is not None and summary["work"] == self.about["work"]

    def windows(self) -> Iterator[list[Line]]:
        lines = self.source.lines(self.own.shard, self.own.shards)
        while window := list(islice(lines, self.own.window)):
            yield window

    async def run(self, context: Context, *, at_once: int) -> None:
        """Answers what is not answered yet, `at_once` lines at a time."""
        answered = set(self.output.windows(self.own.shard))
        room, seen = asyncio.Semaphore(at_once), logs.Progress("batch", unit="lines")
        running: set[asyncio.Task[None]] = set()
        done = 0
        try:
            for window in self.windows():
                done += len(window)
                if window[0].offset in answered:
                    continue
                running.add(asyncio.create_task(self._answer(context, window, room)))
                if len(running) * self.own.window >= AHEAD * at_once + self.own.window:
                    running = await _first_of(running)
                    seen.update(done - len(running) * self.own.window, done)
            while running:
                running = await _first_of(running)
            seen.update(done, done)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _answer(self, context: Context, window: list[Line], room: asyncio.Semaphore) -> None:
        """One window: all its lines, then its file."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._answer_line(context, line, room)) for line in window]
        answers = [task.result() for task in tasks]
        await asyncio.to_thread(self.output.put_window, self.own.shard, window[0].offset, answers)

    async def _answer_line(self, context: Context, line: Line, room: asyncio.Semaphore) -> dict[str, Any]:
        # Each line by itself: whether an id came before, in another shard, nobody here knows.
        request = request_of(line.raw, self.own.endpoint, set())
        line_id = f"batch_req_{self.about['work']}-{line.offset}"
        if request.problem is not None:
            return line_answer(line_id, request, None)
        async with room:
            caller = Caller(request_id=uuid.uuid4().hex)
            return line_answer(
                line_id, request, await persist(lambda: ask(context, self.own.endpoint, request.body, caller))
            )

    def finish(self) -> None:
        """Joins this shard's windows, and all shards when it is the last."""
        try:
            if not self.output.is_finished(self.own.shard):
                self.output.finish_shard(self.own.shard)
            if self.output.finish(self.own.shards, about=self.about):
                self.output.clear()
        except FileNotFoundError:  # another shard joined them at the same time, and cleared up first
            if not self.is_joined:
                raise


async def _first_of(running: "set[asyncio.Task[None]]") -> "set[asyncio.Task[None]]":
    """Those that still run, once one of them is done. Raises what it raised."""
    done, rest = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return rest


async def answer(shard: Shard, package: Package, asked: settings.Settings) -> bool:
    """Loads the model and answers the shard. Returns False when a signal came first."""
    context = context_of(package, asked)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    async def work() -> None:
        await context.host.run()
        await shard.run(context, at_once=2 * asked.max_num_seqs)

    working, stopping = asyncio.create_task(work()), asyncio.create_task(stop.wait())
    waiting: set[asyncio.Future[Any]] = {working, stopping, context.host.failed}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if context.host.failed.done():
            raise EngineError(context.host.failed.result())
        if working.done():
            working.result()
        return working.done()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
        await context.host.stop()


def main(argv: list[str]) -> int:
    started_s = time.monotonic()
    try:
        own, asked = parse(argv)
        shard = Shard(own, asked.model)
        skipped = shard.is_joined or shard.output.is_finished(own.shard)
        if not skipped:
            package = await_package(asked.model)
            # A channel may move while shards start one after another: all of them answer with what the first found.
            pinned = Package(
                **shard.output.pin("model", {"url": package.url, "name": package.name, "digest": package.digest})
            )
            logs.capture_standard_logging()
            if not asyncio.run(answer(shard, pinned, asked)):
                return INTERRUPTED
        if not shard.is_joined:
            shard.finish()
    except Refused as error:
        return logs.end(error, code=2)
    except (EngineError, OSError) as error:
        return logs.end(error, code=1)
    logs.event("done", stage="batch", seconds=round(time.monotonic() - started_s, 3), skipped=skipped)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(INTERRUPTED)
