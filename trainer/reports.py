"""All that a run says of its steps: the progress bar, a row of `log.jsonl`, the metrics, and sinks that were asked for."""

from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.data import Cursor
from trainer.history import History
from trainer.log import Log
from trainer.meter import Meter
from trainer.metrics import TrainMetrics
from trainer.parallel import Ranks
from trainer.sinks import open_sinks


class Reports:
    """Of one rank; only rank 0's are read. Raises Refused where metrics or a sink cannot be opened."""

    def __init__(self, config: TrainConfig, run: Path, *, ranks: Ranks, outputs: int, cursor: Cursor, log: Log) -> None:
        self._config, self._ranks, self._log = config, ranks, log
        self.history, self.metrics = History(run), TrainMetrics()
        self._meter = Meter(config, outputs=outputs, world=ranks.world, device=ranks.device, cursor=cursor)
        self._sinks = open_sinks(config.sinks, run, config.model_dump(mode="json")) if ranks.first else []
        if ranks.first:
            self.metrics.serve()
        self.metrics.steps.set(config.steps)
        if cursor.shortened:
            which = f"{cursor.shortened} examples are longer than seq {config.seq} and are cut"
            message = f"{which}; {cursor.left_out} of them have nothing left to learn"
            log.emit("shortened", level="warning", count=cursor.shortened, message=message)

    def begin(self, step: int) -> None:
        """Drops what was said of the steps after `step`: they will be made again."""
        if self._ranks.first:
            self.history.begin(step)
        self._meter.begin(self.history.rows() if self._ranks.first else [])

    def step_done(self, step: int, *, loss: float, lr: float, grad_norm: float, seconds: float) -> None:
        """`step` steps are made, the last of them in so many seconds."""
        self._meter.stepped(seconds)
        row: dict[str, Any] = {"step": step, "loss": loss, "lr": lr}
        row["tokens_per_s"] = round(self._meter.tokens_per_s, 1)
        self._log.progress("train", done=step, total=self._config.steps, unit="steps", **row)
        self.metrics.step.set(step)
        self.metrics.tokens.inc(self._config.global_batch * self._config.seq)
        if step % self._config.log_every_steps and step != self._config.steps:
            return
        row |= {"grad_norm": grad_norm, **self._meter.row()}
        self.metrics.show(row)
        if self._ranks.first:
            self.history.append(**row)
        for sink in self._sinks:
            sink.write(row)

    def checkpointed(self, step: int, *, seconds: float) -> None:
        self.metrics.checkpoint_seconds.set(seconds)
        self.metrics.last_checkpoint_step.set(step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
