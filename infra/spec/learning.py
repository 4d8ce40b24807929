"""How a model learns: optimizer and schedule, adapters, replicas that train apart, checkpoints, and what to do when it goes wrong."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infra.spec.base import Misplaced, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share, Spec

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_TARGETS: tuple[LoraTarget, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Optim(Spec):
    """AdamW with linear warm-up and cosine decay."""

    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: NonNegativeFloat
    """Learning rate at the last step."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices; vectors are not decayed."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay rates of the moments."""
    eps: PositiveFloat = 1e-8
    """Epsilon of AdamW."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm."""

    @model_validator(mode="after")
    def _only_falls(self) -> Self:
        if self.min_lr > self.lr:
            raise Misplaced(f"{self.min_lr:g} is above lr {self.lr:g}; the cosine only falls", "min_lr")
        return self


class Lora(Spec):
    """Low-rank adapters beside frozen matrices, trained alone (Hu et al. 2021)."""

    rank: PositiveInt = 16
    """Inner width of an adapter."""
    alpha: PositiveFloat = 32.0
    """The adapter's output is scaled by alpha / rank."""
    targets: tuple[LoraTarget, ...] = Field(default=ALL_TARGETS, min_length=1)
    """Matrices that get one."""
    export: Literal["merged", "adapters"] = "merged"
    """What is published: `merged`, a model of its own; or the `adapters` alone, in PEFT's layout, which a service of their base serves
    beside it (`services[].adapters`)."""


class LocalSgd(Spec):
    """Data-parallel replicas that train apart and meet every few steps (DiLoCo): for slow links between nodes."""

    every_steps: PositiveInt
    """Steps between two meetings."""
    outer_lr: PositiveFloat = 0.7
    """Learning rate of the outer Nesterov step."""
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Its momentum."""
    fragments: PositiveInt = 1
    """Parts of the model, each synchronised at a step of its own."""
    overlap_steps: NonNegativeInt = 0
    """Steps that go on while a fragment travels."""
    launches: Annotated[int, Field(ge=2, le=64)] | None = None
    """Replicas that are gangs of their own, each a Job of `nodes` / launches pods: one may die and return, and the others go on.
    null: all are in one gang, which starts again together."""
    lost_after_s: PositiveFloat | None = None
    """Seconds without a sign of life after which the others go on without a launch; null: 15."""

    @model_validator(mode="after")
    def _fits_between(self) -> Self:
        if self.launches and self.overlap_steps:
            raise Misplaced(
                "what travels would be lost with a launch that dies; leave one of the two out", "overlap_steps"
            )
        if self.lost_after_s and not self.launches:
            raise Misplaced("is of replicas that are launches of their own; set launches too", "lost_after_s")
        if self.fragments > self.every_steps:
            raise Misplaced(f"{self.fragments} are more than every_steps {self.every_steps}", "fragments")
        if self.overlap_steps >= self.every_steps:
            raise Misplaced(
                f"{self.overlap_steps} must be below every_steps {self.every_steps}: a fragment has to arrive before it leaves again",
                "overlap_steps",
            )
        return self


class Recover(Spec):
    """What to do with a loss or gradients that are not finite, with a spike, and with a collective that hangs."""

    bad_step: Literal["stop", "skip"] = "stop"
    """`stop` the run, or `skip`: back to the newest checkpoint, and past the batch."""
    spike_factor: PositiveFloat | None = None
    """A loss this many times the running mean counts as bad; null: no loss that is finite does."""
    max_skips: PositiveInt = 3
    """Batches that are skipped before the run stops after all."""
    hang_timeout_s: PositiveFloat = 600.0
    """Seconds without a finished step before every rank's stack is dumped and all start again."""

    @model_validator(mode="after")
    def _is_above_the_mean(self) -> Self:
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise Misplaced(f"{self.spike_factor:g} times the mean is no spike; it must be above 1", "spike_factor")
        return self


class Checkpoint(Spec):
    every_steps: PositiveInt = 500
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints of these steps are all kept; null: only the newest."""
    url: str | None = None
    """fsspec URL of an object store for checkpoints, which then outlive the volume: `s3://acme-runs`. null: the volume of runs."""

    @model_validator(mode="after")
    def _is_a_url(self) -> Self:
        if self.url is not None and "://" not in self.url:
            raise Misplaced(f"{self.url!r} is no URL of an object store; leave it out for the volume of runs", "url")
        return self
