"""What a run leaves behind: curves for people, and the model package, which says what it was made from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.export import Read, export_package
from trainer.files import read_json
from trainer.model import Decoder
from trainer.package import Origin, make_decoder
from trainer.parallel import Laid, Ranks
from trainer.provenance import hardware, source_revision
from trainer.state import load_weights


def _made_from(config: TrainConfig, dataset: Dataset, origin: Origin) -> dict[str, str]:
    return {"config_digest": config.run_digest(), "data_digest": dataset.digest, **origin.identity}


def finished(config: TrainConfig, dataset: Dataset, run: Path, origin: Origin) -> bool:
    """Whether the package is there; it appears whole or not at all."""
    provenance = read_json(run / "model" / "slipway.json")
    wanted = _made_from(config, dataset, origin)
    return provenance is not None and all(provenance.get(name) == digest for name, digest in wanted.items())


def finish(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    laid: Laid,
    checkpoint: str,
    *,
    ranks: Ranks,
    origin: Origin,
    rows: list[dict[str, Any]],
) -> None:
    """Writes plots of the `rows` of the log, and the package of the model in memory or, where ranks share it, of `checkpoint`.

    There are no rows where the log was lost and the checkpoints, in a place of their own, were not.
    """
    from trainer.plot import (  # matplotlib takes a second to load, and a resumed run may never come here
        plot_cost,
        plot_loss,
    )

    if rows:
        title = f"Training loss · {config.steps:,} steps · {rows[-1]['loss']:.3f} at the end"
        plot_loss(rows, run / "loss.png", title=title)
        plot_cost(rows, run / "cost.png", title="Speed, and where time and memory went")
    model, read = _whole_model(config, dataset, laid, checkpoint, ranks=ranks)
    provenance = {
        **_made_from(config, dataset, origin),
        "source_revision": source_revision(),
        "steps": config.steps,
        "tokens": config.steps * config.global_batch * config.seq,
        "losses": {"first": rows[0]["loss"], "final": rows[-1]["loss"]} if rows else {},
        "hardware": hardware(),
    }
    more = {"lora": config.lora, "base": origin.package, "read": read}
    export_package(model, dataset, run / "model", provenance=provenance, **more)


def _whole_model(
    config: TrainConfig, dataset: Dataset, laid: Laid, checkpoint: str, *, ranks: Ranks
) -> tuple[Decoder, Read | None]:
    """The model as it lies on this rank, or where ranks share it its shape, and how to read its last checkpoint."""
    if ranks.mesh is None:
        return laid.parts[0], None
    labels = None if dataset.labels is None else len(dataset.labels)
    with torch.device("meta"):
        model = make_decoder(config, vocab_size=dataset.vocab_size, labels=labels)
    shapes, replica = dict(model.named_parameters()), 0 if ranks.independent_replicas else None

    def read(names: list[str]) -> dict[str, Tensor]:
        weights = {name: torch.empty(shapes[name].shape) for name in names}
        load_weights(weights, checkpoint, replica=replica)
        return weights

    return model, read
