"""Checkpoints that are whole or absent, known by their digests, written while the training goes on.

`checkpoints/step-NNNNNNNN/` holds PyTorch's distributed checkpoint format and `manifest.json` with the sha256 of every
file. A save copies the state to memory of its own and returns; a thread of every rank writes its part under another
name, and rank 0 renames it when all of it is on the disk. Any layout can load what any other saved: the parts are known
by the names of the parameters and their place in them.
"""

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from trainer.config import CheckpointConfig
from trainer.errors import Failed, Refused
from trainer.files import damaged_file, describe_files, put_in_place, read_json, write_json
from trainer.log import Log
from trainer.parallel.ranks import Ranks
from trainer.progress import Progress
from trainer.state import training_state

_PREFIX = "step-"


class Checkpoints:
    """The checkpoints of one run. `identity` is the digest of config and data: no other run's state is ever loaded."""

    def __init__(self, run: Path, *, config: CheckpointConfig, identity: str, ranks: Ranks, log: Log) -> None:
        self._directory, self._config, self._identity = run / "checkpoints", config, identity
        self._ranks, self._log = ranks, log
        # A group of its own: its collectives run in a thread, beside those of the training.
        group = dist.new_group(backend="gloo") if ranks.world > 1 else None
        assert not isinstance(group, int), "every rank is a member"
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[float] | None = None
        self._saving_step = self.saved_step = 0
        self.seconds = 0.0
        """What the last whole save took, from copy to rename."""

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        names = (path.name.removeprefix(_PREFIX) for path in self._directory.glob(f"{_PREFIX}*"))
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self._directory / f"{_PREFIX}{step:08d}"

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
        self._saving = self._thread.submit(self._write, copy, progress.as_json(), progress.step, begun_s)

    def wait(self) -> None:
        """Returns when the last save is on the disk. Raises Failed, with nothing of it left behind, when it is not."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            self.seconds = saving.result()
            self.saved_step = self._saving_step
        except (CheckpointException, OSError) as error:
            raise Failed(
                f"the checkpoint of step {self._saving_step} could not be written: {_cause(error)}",
                where=str(self._directory),
                fix="Free some space there or make it writable, and start again: the run goes on from the one before.",
            ) from None

    def poll(self) -> None:
        """Takes note of a save that has ended well since; one that has not is told by the next `save` or `wait`."""
        if self._saving is not None and self._saving.done() and self._saving.exception() is None:
            self.wait()

    def _write(self, state: dict[str, Any], progress: dict[str, Any], step: int, begun_s: float) -> float:
        """In the thread of each rank: its files, their digests, then rank 0's seal. All ranks fail if one does."""
        beside = self._directory / f".{self.path(step).name}.partial"
        try:
            self._together(lambda: self._make_room(beside) if self._ranks.first else None)
            writer = FileSystemWriter(beside, sync_files=True)
            state_dict_saver.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            described = self._together(lambda: describe_files(beside, prefix=f"__{self._ranks.rank}_"))
            self._together(lambda: self._seal(step, beside, progress, described) if self._ranks.first else None)
        except (CheckpointException, OSError):
            if self._ranks.first:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        return time.monotonic() - begun_s

    def _together(self, act: Any) -> list[Any]:
        """What `act` returns on every rank, by rank; where it raises OSError on one, all raise it."""
        try:
            result = act()
        except OSError as error:
            result = error
        if self._group is None:
            results = [result]
        else:
            results: list[Any] = [None] * self._ranks.world
            dist.all_gather_object(results, result, group=self._group)
        for found in results:
            if isinstance(found, OSError):
                raise found
        return results

    @staticmethod
    def _make_room(beside: Path) -> None:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)

    def _seal(self, step: int, beside: Path, progress: dict[str, Any], described: list[dict[str, Any]]) -> None:
        files = {name: entry for own in described for name, entry in own.items()} | describe_files(beside, prefix=".")
        manifest = {"step": step, "identity": self._identity, "progress": progress, "files": files}
        write_json(beside / "manifest.json", manifest)
        put_in_place(beside, self.path(step))
        each = self._config.keep_every_steps
        for old in self.steps()[: -self._config.keep]:
            if not each or old % each:
                shutil.rmtree(self.path(old))

    def load_newest(self, parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer, **more: Any) -> Progress | None:
        """Loads the newest whole checkpoint, whatever layout saved it, and says how far it is; None when there is none.

        Raises Refused when the checkpoints are another run's.
        """
        for step in reversed(self._ranks.from_first(self.steps() if self._ranks.first else [])):
            manifest = self._ranks.from_first(
                read_json(self.path(step) / "manifest.json") if self._ranks.first else None
            )
            damaged = self._damaged(step, manifest)
            if damaged is None:
                if manifest["identity"] != self._identity:
                    raise Refused(
                        "the run directory holds checkpoints of another config or dataset",
                        where=str(self._directory),
                        fix="Give run= another directory, or remove this one.",
                    )
                state = training_state(parts, optimizer, self._ranks, **more)
                state_dict_loader.load(
                    state, storage_reader=FileSystemReader(self.path(step)), no_dist=self._ranks.world == 1
                )
                own = state[f"replica-{self._ranks.replica}"] if self._ranks.independent_replicas else state
                torch.set_rng_state(own["random"])
                return Progress.from_json(manifest["progress"])
            self._log.emit(
                "damaged_checkpoint",
                level="warning",
                step=step,
                message=f"{self.path(step) / damaged} is not as it was written: going back to the one before",
            )
        return None

    def _damaged(self, step: int, manifest: dict[str, Any] | None) -> str | None:
        """The first file that is not as it was written; every rank reads its share of them."""
        if manifest is None:
            return "manifest.json"
        own = dict(sorted(manifest["files"].items())[self._ranks.rank :: self._ranks.world])
        found = damaged_file(self.path(step), own)
        if self._group is None:
            return found
        every: list[str | None] = [None] * self._ranks.world
        dist.all_gather_object(every, found, group=self._group)
        return next((name for name in every if name), None)


def _cause(error: BaseException) -> str:
    """The system's own words, where the storage layer wrapped them."""
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
