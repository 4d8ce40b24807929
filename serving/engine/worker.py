"""The engine's own process: `python -m serving.engine.worker FD`, started by `client.EngineProcess`.

A process and not a thread: Python's one lock would make every step wait for the HTTP side's work and the other way
round, a model swapped out gives back all of its memory, and a server that waits for a model never imports torch.
"""

import os
import pickle
import queue
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from serving.engine.child import ignore_signals, receive
from serving.engine.messages import (
    Abort,
    Add,
    Failed,
    Forget,
    Load,
    Loading,
    Ready,
    Reply,
    Request,
    Step,
)
from serving.engine.messages import Stop as StopMessage
from serving.errors import Refused

PROGRESS_INTERVAL_S = 0.25
RANK_DEATH_S = 1.0


def main() -> None:
    ignore_signals()
    connection = Outbox(int(sys.argv[1]))
    inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=receive, args=(connection, inbox), daemon=True).start()
    load = inbox.get()
    assert isinstance(load, Load)
    try:
        _serve(load, inbox, connection)
    except Refused as error:
        connection.send(Failed(str(error), refused=True))
    except Exception as error:
        if load.settings.tensor_parallel_size > 1:
            time.sleep(RANK_DEATH_S)  # a rank that died is the reason, and whoever watches it says so
        connection.send(Failed(f"{type(error).__name__}: {error}", refused=False))
        raise


class Outbox(Connection):
    """The connection, for more than one thread to send by."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._lock = threading.Lock()

    def send(self, obj: Reply) -> None:
        data = pickle.dumps(obj, pickle.HIGHEST_PROTOCOL)  # multiprocessing's own pickler is slower
        with self._lock:
            self.send_bytes(data)


def _end_with_ranks(connection: Outbox) -> None:
    """Ends this process when one of the other ranks' has ended: the sums that it waits for will never be."""
    from serving.engine.ranks import deaths

    connection.send(Failed(deaths.get(), refused=False))
    os._exit(1)


def _serve(load: Load, inbox: "queue.SimpleQueue[Request]", connection: Outbox) -> None:
    from serving.engine.engine import Engine  # imports torch, which takes seconds: the server hears about them

    if load.settings.tensor_parallel_size > 1:
        threading.Thread(target=_end_with_ranks, args=(connection,), daemon=True).start()
    engine = Engine.load(Path(load.root), load.settings, on_bytes=_progress(connection))
    engine.warm_up()  # ready means that a token was made
    blocks = engine.scheduler.blocks
    connection.send(Ready(engine.max_model_len, engine.vocab_size))
    while True:
        while not engine.has_work or not inbox.empty():
            match inbox.get():
                case Add(seq_id, prompt_ids, params, arrived_s, priority, tenant, adapter):
                    engine.add(
                        seq_id, prompt_ids, params,
                        arrived_s=arrived_s, priority=priority, tenant=tenant, adapter=adapter,
                    )  # fmt: skip
                case Forget(adapter):
                    engine.adapters.forget(adapter)
                case Abort(seq_ids):
                    for seq_id in seq_ids:
                        engine.abort(seq_id)
                    if not engine.has_work:
                        connection.send(Step([], 0, 0, blocks.used_ratio, engine.counters))
                case StopMessage():
                    return
        outputs = engine.step()
        scheduler = engine.scheduler
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        connection.send(Step(outputs, running, waiting, blocks.used_ratio, engine.counters, *engine.usage.ratios))


def _progress(connection: Connection):
    next_s = 0.0

    def on_bytes(done: int, total: int) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s or done >= total:
            next_s = time.monotonic() + PROGRESS_INTERVAL_S
            connection.send(Loading(done, total))

    return on_bytes


if __name__ == "__main__":
    main()
