"""Checkpoints that are whole or absent, known by their digests, and older ones to fall back on.

`checkpoints/step-NNNNNNNN/` holds PyTorch's distributed checkpoint format and `manifest.json` with the sha256 of every
file. It is written under another name and renamed when all of it is on the disk.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from trainer.errors import Failed, Refused
from trainer.files import damaged_file, describe_files, put_in_place, read_json, write_json
from trainer.log import Log
from trainer.parallel import Ranks

_PREFIX = "step-"


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "random": torch.get_rng_state()}


class Checkpoints:
    """The checkpoints of one run. `identity` is the digest of config and data: no other run's state is ever loaded."""

    def __init__(self, run: Path, *, keep: int, identity: str, ranks: Ranks, log: Log) -> None:
        self._directory, self._keep, self._identity = run / "checkpoints", keep, identity
        self._ranks, self._log = ranks, log

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        names = (path.name.removeprefix(_PREFIX) for path in self._directory.glob(f"{_PREFIX}*"))
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self._directory / f"{_PREFIX}{step:08d}"

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """All ranks write their part; rank 0 seals it. Raises Failed, with nothing left behind, when one cannot."""
        beside = self._directory / f".{self.path(step).name}.partial"
        try:
            if self._ranks.first:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            self._ranks.barrier()
            writer = FileSystemWriter(beside, sync_files=True)
            state_dict_saver.save(_state(model, optimizer), storage_writer=writer, no_dist=self._ranks.world == 1)
            if self._ranks.first:
                self._seal(step, beside)
        except (CheckpointException, OSError) as error:
            if self._ranks.first:
                shutil.rmtree(beside, ignore_errors=True)
            raise Failed(
                f"the checkpoint of step {step} could not be written: {_cause(error)}",
                where=str(self._directory),
                fix="Free some space there or make it writable, and start again: the run goes on from the one before.",
            ) from None
        self._ranks.barrier()

    def _seal(self, step: int, beside: Path) -> None:
        files = describe_files(beside)
        write_json(beside / "manifest.json", {"step": step, "identity": self._identity, "files": files})
        put_in_place(beside, self.path(step))
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old))

    def load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Loads the newest whole checkpoint and returns its step; 0, with nothing loaded, when there is none.

        Raises Refused when the checkpoints are another run's.
        """
        # Only the ranks together know whether rank 0 refused: it tells them by a negative number.
        step = self._newest_whole() if self._ranks.first else 0
        step = self._ranks.from_first(step)
        if step < 0:
            raise Refused(
                "the run directory holds checkpoints of another config or dataset",
                where=str(self._directory),
                fix="Give run= another directory, or remove this one.",
            )
        if step:
            state = _state(model, optimizer)
            reader = FileSystemReader(self.path(step))
            state_dict_loader.load(state, storage_reader=reader, no_dist=self._ranks.world == 1)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            torch.set_rng_state(state["random"])
        return step

    def _newest_whole(self) -> int:
        """The step of the newest checkpoint that is as it was written; 0 when there is none, -1 when not of this run."""
        for step in reversed(self.steps()):
            manifest = read_json(self.path(step) / "manifest.json")
            damaged = "manifest.json" if manifest is None else damaged_file(self.path(step), manifest["files"])
            if manifest is not None and not damaged:
                return step if manifest["identity"] == self._identity else -1
            self._log.emit(
                "damaged_checkpoint",
                level="warning",
                step=step,
                message=f"{self.path(step) / str(damaged)} is not as it was written: going back to the one before",
            )
        return 0


def _cause(error: BaseException) -> str:
    """The system's own words, where the storage layer wrapped them."""
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
