"""Other places for the rows of the log: TensorBoard and Weights & Biases, by their own libraries."""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import Refused


class Sink(Protocol):
    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `run/tensorboard/`."""

    def __init__(self, run: Path, _about: dict[str, Any]) -> None:
        _need("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "at"):
                self._writer.add_scalar(f"train/{name}", value, row["step"], walltime=row.get("at"))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `slipway`; WANDB_* in the environment says where it goes and by whose key."""

    def __init__(self, run: Path, about: dict[str, Any]) -> None:
        wandb = _need("wandb", "wandb")
        # By its directory a run that was resumed goes on as the same run.
        self._run = wandb.init(project="slipway", dir=str(run), id=run.resolve().name, resume="allow", config=about)

    def write(self, row: dict[str, Any]) -> None:
        self._run.log({f"train/{name}": value for name, value in row.items() if name != "at"}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def open_sinks(names: tuple[str, ...], run: Path, about: dict[str, Any]) -> list[Sink]:
    """Raises Refused for one whose library is not installed."""
    return [_KINDS[name](run, about) for name in names]


def _need(library: str, package: str) -> Any:
    try:
        return import_module(library)
    except ImportError:
        fix = f"Install it (pip install {package}), or remove it from sinks."
        raise Refused(f"{library} is not installed", where="sinks", fix=fix) from None
