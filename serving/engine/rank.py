"""One of the other ranks' processes: `python -m serving.engine.rank FD`, started by `ranks.Ranks`."""

import queue
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import cast

import torch

from serving.engine.adapters import Adapters
from serving.engine.child import ignore_signals, receive
from serving.engine.messages import Failed
from serving.engine.parts import Loaded, adapters_of, load_share, pool_of
from serving.engine.ranks import Begin, Join, Logits, Message, Store, Work, meet
from serving.engine.scheduler import Scheduled
from serving.errors import Refused
from serving.model.config import ModelConfig
from serving.model.rope import rope_table
from serving.model.shard import SplitHead, join

ENGINE_DEATH_S = 1.0


def main() -> None:
    ignore_signals()
    connection = Connection(int(sys.argv[1]))
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=receive, args=(connection, inbox), daemon=True).start()
    told = inbox.get()
    assert isinstance(told, Join)
    torch.set_num_threads(told.threads)
    config = ModelConfig.read(told.root / "config.json")
    try:
        loaded = load_share(told.root, config, told.settings, told.shard, on_bytes=lambda *_: None)
    except Refused as error:
        connection.send(Failed(str(error), refused=True))
        return
    head = join(loaded.model, told.shard, config, ask=lambda _: None)
    connection.send(None)
    meet(Store("127.0.0.1", told.port, told.shard.size, is_master=False), told.shard, told.settings)
    begin = inbox.get()
    assert isinstance(begin, Begin)
    try:
        follow(loaded, head, adapters_of(loaded, config, told.settings, told.shard), begin, inbox)
    except RuntimeError:
        time.sleep(ENGINE_DEATH_S)  # a sum fails when the engine has died: that is no news, and `receive` ends this
        raise


@torch.inference_mode()
def follow(
    loaded: Loaded, head: SplitHead, adapters: Adapters, begin: Begin, inbox: "queue.SimpleQueue[Message]"
) -> None:
    """Computes this rank's share of every step, for ever."""
    model, device = loaded.model, loaded.device
    pool = pool_of(loaded, num_blocks=begin.num_blocks)
    cos, sin = (
        table.to(device, model.compute_dtype) for table in rope_table(model.config, positions=begin.max_model_len)
    )
    while True:
        match inbox.get():
            case Work(ids, items):
                batch = cast("list[Scheduled]", items)
                for item in items:
                    adapters.acquire(item.seq)
                adapters.group(batch)
                plan = pool.plan(batch)
                positions = torch.from_numpy(plan.positions).to(device)
                model(torch.tensor(ids, device=device), cos[positions], sin[positions], plan)
                for item in items:
                    adapters.release(item.seq)
            case Logits(rows):
                head.serve(torch.empty(rows, model.config.hidden, dtype=model.compute_dtype, device=device))
            case other:
                raise AssertionError(other)


if __name__ == "__main__":
    main()
