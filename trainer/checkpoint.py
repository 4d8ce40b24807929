"""Checkpoints that are whole or absent, known by their digests, written while the training goes on.

`step-NNNNNNNN/` holds PyTorch's distributed checkpoint format and `manifest.json` with the sha256 of every file. A save
copies the state to memory of its own and returns; a thread of every rank writes its part, and rank 0 seals it when all
of it is there. Any layout can load what any other saved: the parts are known by the names of the parameters and their
place in them.
"""

import errno
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from trainer.config import CheckpointConfig
from trainer.errors import Failed, Refused
from trainer.log import Log
from trainer.parallel.ranks import Ranks
from trainer.progress import Progress
from trainer.state import training_state
from trainer.storage import Storage


class Checkpoints:
    """The checkpoints of one run. `identity` is the digest of config and data: no other run's state is ever loaded."""

    def __init__(self, storage: Storage, *, config: CheckpointConfig, identity: str, ranks: Ranks, log: Log) -> None:
        self.storage, self._config, self._identity = storage, config, identity
        self._ranks, self._log = ranks, log
        # A group of its own: its collectives run in a thread, beside those of the training.
        group = dist.new_group(backend="gloo") if ranks.world > 1 else None
        assert not isinstance(group, int), "every rank is a member"
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[float] | None = None
        self._saving_step = self.saved_step = 0
        self.seconds = 0.0
        """What the last whole save took, from copy to seal."""

    def save(
        self, progress: Progress, parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer, **more: Any
    ) -> None:
        """Begins to write the state; the caller may change it at once. Waits for the save before, if it is not done.

        Raises Failed when that one could not be written.
        """
        self.wait()
        cuda = self._ranks.device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
        )
        begun_s = time.monotonic()
        copy = DefaultStager(options).stage(training_state(parts, optimizer, self._ranks, **more))
        assert isinstance(copy, dict)
        self._saving_step = progress.step
        self._saving = self._thread.submit(self._write, copy, asdict(progress), progress.step, begun_s)

    def wait(self) -> None:
        """Returns when the last save is on the disk. Raises Failed, with nothing of it left behind, when it is not."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        self.seconds = saving.result()
        self.saved_step = self._saving_step

    def poll(self) -> None:
        """Takes note of a save that has ended well since; one that has not is told by the next `save` or `wait`."""
        if self._saving is not None and self._saving.done() and self._saving.exception() is None:
            self.wait()

    def _write(self, state: dict[str, Any], progress: dict[str, Any], step: int, begun_s: float) -> float:
        """In the thread of each rank: its files, their digests, then rank 0's seal. All ranks fail if one does."""
        first, writer = self._ranks.first, self.storage.writer(step)
        try:
            self._together(lambda: self.storage.begin(step) if first else None)
            state_dict_saver.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            files = {name: entry for own in self._together(lambda: writer.files) for name, entry in own.items()}
            manifest = {"step": step, "identity": self._identity, "progress": progress, "files": files}
            self._together(lambda: self._seal(step, manifest) if first else None)
        except (CheckpointException, OSError) as error:
            raise self._given_up(step, _cause(error)) from None
        return time.monotonic() - begun_s

    def _given_up(self, step: int, cause: BaseException) -> Failed:
        """Leaves nothing of the checkpoint behind; all ranks say the same, and how much room there is without it."""
        if self._ranks.first:
            self.storage.give_up(step)
        full = isinstance(cause, OSError) and cause.errno == errno.ENOSPC
        free_bytes = self._gathered(self.storage.free_bytes() if full and self._ranks.first else None)[0]
        room = "" if free_bytes is None else f", where {free_bytes / 2**20:.1f} MiB are free"
        why = (cause.strerror if isinstance(cause, OSError) else None) or str(cause).splitlines()[0]
        return Failed(
            f"the checkpoint of step {step} could not be written: {why}",
            where=f"{self.storage}{room}",
            fix="Free some space there or make it writable, and start again: the run goes on from the one before.",
        )

    def _together(self, act: Callable[[], Any]) -> list[Any]:
        """What `act` returns on every rank, by rank; where it fails on one, all raise an OSError."""
        try:
            result = act()
        except Exception as error:  # each store's library has its own
            result = error if isinstance(error, OSError) else OSError(str(error))
        results = self._gathered(result)
        for found in results:
            if isinstance(found, OSError):
                raise found
        return results

    def _gathered(self, own: Any) -> list[Any]:
        if self._group is None:
            return [own]
        results: list[Any] = [None] * self._ranks.world
        dist.all_gather_object(results, own, group=self._group)
        return results

    def _seal(self, step: int, manifest: dict[str, Any]) -> None:
        self.storage.seal(step, manifest)
        each, steps = self._config.keep_every_steps, self.storage.steps()
        kept = {*steps[-self._config.keep :], *(old for old in steps if each and old % each == 0)}
        try:
            self.storage.keep(kept, before=step)
        except (
            Exception
        ) as error:  # each store's library has its own; the new one is there, and the next save tries again
            message = f"an old checkpoint could not be removed: {error}"
            self._log.emit("left_behind", level="warning", step=step, message=message)

    def load_newest(self, parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer, **more: Any) -> Progress | None:
        """Loads the newest whole checkpoint, whatever layout saved it, and says how far it is; None when there is none.

        Raises Refused when the checkpoints are another run's.
        """
        first = self._ranks.first
        for step in reversed(self._ranks.from_first(self.storage.steps() if first else [])):
            manifest = self._ranks.from_first(self.storage.manifest(step) if first else None)
            damaged = self._damaged(step, manifest)
            if damaged is None:
                if manifest["identity"] != self._identity:
                    raise Refused(
                        "there are checkpoints of another config or dataset",
                        where=str(self.storage),
                        fix="Give run= or checkpoints= another place, or remove them.",
                    )
                state = training_state(parts, optimizer, self._ranks, **more)
                alone = self._ranks.world == 1
                state_dict_loader.load(state, storage_reader=self.storage.reader(step), no_dist=alone)
                own = state[f"replica-{self._ranks.replica}"] if self._ranks.independent_replicas else state
                torch.set_rng_state(own["random"])
                return Progress(**manifest["progress"])
            self._log.emit(
                "damaged_checkpoint",
                level="warning",
                step=step,
                message=f"{self.storage.url(step)}/{damaged} is not as it was written: going back to the one before",
            )
        return None

    def _damaged(self, step: int, manifest: dict[str, Any] | None) -> str | None:
        """The first file that is not as it was written; every rank reads its share of them."""
        if manifest is None:
            return "manifest.json"
        own = dict(sorted(manifest["files"].items())[self._ranks.rank :: self._ranks.world])
        return next((name for name in self._gathered(self.storage.damaged(step, own)) if name), None)


def _cause(error: CheckpointException | OSError) -> BaseException:
    """What befell the ranks: the system's own error where one of them has it, else the first."""
    if isinstance(error, OSError):
        return error
    found = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
    return next((each for each in found if isinstance(each, OSError)), found[0])
