"""A model over several processes: rank 0 is the engine, and the others compute their share of every step with it.

The engine tells them what each step is by a pipe (tokens, and where their keys and values lie), and the model's sums
over the ranks keep them in step: gloo on CPUs, NCCL on GPUs. One that dies takes the engine with it, which says so.
"""

import os
import queue
import subprocess
import threading
from collections.abc import Sequence as Seq
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from serving.engine import child
from serving.engine.attention import Plan, Pool
from serving.engine.messages import AdapterRef, Failed
from serving.engine.scheduler import Scheduled
from serving.errors import Refused
from serving.model.shard import Shard
from serving.settings import Settings

Store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage] (documented, and not in its module's list)
JOIN_TIMEOUT = timedelta(minutes=30)  # weights may come over a slow disk
deaths: "queue.SimpleQueue[str]" = queue.SimpleQueue()  # what is to be said of ranks that ended by themselves


class Join(NamedTuple):
    root: Path
    settings: Settings
    shard: Shard
    port: int  # of the store where the ranks meet
    threads: int


class Begin(NamedTuple):
    """All have loaded: this is the memory that each can have for keys and values."""

    num_blocks: int
    max_model_len: int


class Part(NamedTuple):
    """Of one sequence, what a rank's layers need to know."""

    num_computed: int
    block_table: list[int]
    adapter: AdapterRef | None


class Item(NamedTuple):
    seq: Part
    num_tokens: int


class Work(NamedTuple):
    ids: list[int]
    items: list[Item]


class Logits(NamedTuple):
    rows: int


Message = Join | Begin | Work | Logits


class Ranks:
    """The other ranks, as rank 0 sees them."""

    def __init__(self, root: Path, settings: Settings) -> None:
        """Starts them; they load while rank 0 does."""
        self.size, self._settings = settings.tensor_parallel_size, settings
        threads = max(1, torch.get_num_threads() // self.size)  # of one machine's processors
        torch.set_num_threads(threads)
        self._store = Store("127.0.0.1", 0, self.size, is_master=True, wait_for_workers=False)
        self._connections: list[Connection] = []
        for rank in range(1, self.size):
            process, connection = child.start("serving.engine.rank")
            self._connections.append(connection)
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()
            connection.send(Join(root, settings, Shard(rank, self.size), self._store.port, threads))

    def meet(self) -> None:
        """Returns once every rank has its share of the weights. Raises `Refused` with what one of them refused."""
        for connection in self._connections:
            answer = connection.recv()
            if isinstance(answer, Failed):
                raise Refused.repeated(answer.message)
        meet(self._store, Shard(0, self.size), self._settings)

    def send(self, message: Message) -> None:
        for connection in self._connections:
            connection.send(message)

    def ask_logits(self, rows: int) -> None:
        self.send(Logits(rows))

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        code = process.wait()
        if code != 0:  # else it refused, and has said so, or we hung up
            deaths.put(f"rank {rank} of {self.size} ended by itself (exit code {code}); without it there is no answer")


class RankedPool:
    """The engine's own memory for keys and values. What is planned with it is told to the other ranks."""

    def __init__(self, pool: Pool, ranks: Ranks) -> None:
        self._pool, self._ranks = pool, ranks
        self.layers, self.device = pool.layers, pool.device

    def plan(self, batch: Seq[Scheduled]) -> Plan:
        items = [
            Item(Part(item.seq.num_computed, item.seq.block_table, item.seq.adapter), item.num_tokens) for item in batch
        ]
        self._ranks.send(Work([token for item in batch for token in item.token_ids], items))
        return self._pool.plan(batch)


def meet(store: Store, shard: Shard, settings: Settings) -> None:
    """Joins the ranks' group. All are on this machine, so CPUs talk by its loopback whatever its other networks are."""
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(shard.rank)
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=shard.rank, world_size=shard.size, timeout=JOIN_TIMEOUT
    )
