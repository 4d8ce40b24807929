"""What a program is told: one frozen, validated class for each. `command.py` reads them."""

import typing
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.errors import Refused
from trainer.files import digest_of


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def digest(self) -> str:
        return digest_of(self.model_dump(mode="json"))


Family = Literal["llama", "mistral", "qwen2", "qwen3"]


class RopeScaling(Config):
    """Llama 3.1's: waves longer than `original_context` / `low_freq_factor` turn `factor` times slower."""

    factor: float = Field(gt=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_context: int = Field(ge=2)

    @model_validator(mode="after")
    def _in_order(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor:g} must be above low_freq_factor {self.low_freq_factor:g}"
            )
        return self


class ModelConfig(Config):
    """The shape of a Llama-family decoder; the size of the vocabulary comes with the dataset."""

    family: Family = "llama"  # qwen2 adds biases before attention, qwen3 norms of queries and keys
    layers: int = Field(ge=1)
    hidden: int = Field(ge=2)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    ffn: int = Field(ge=1)
    max_context: int = Field(ge=2)
    tied_embeddings: bool = True
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    norm_eps: float = Field(default=1e-5, gt=0)

    @property
    def head_width(self) -> int:
        return self.head_dim if self.head_dim is not None else self.hidden // self.heads

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        if self.hidden % self.heads:  # with a head_dim of its own too: Transformers opens no other
            fits = [heads for heads in range(1, self.hidden + 1) if self.hidden % heads == 0]
            raise ValueError(
                f"hidden {self.hidden} does not divide by heads {self.heads}; {_nearest(self.heads, fits)}"
            )
        if self.head_width % 2:
            raise ValueError(f"the width of a head, {self.head_width}, must be even: RoPE turns pairs")
        if self.heads % self.kv_heads:
            fits = [heads for heads in range(1, self.heads + 1) if self.heads % heads == 0]
            raise ValueError(
                f"kv_heads {self.kv_heads} must divide heads {self.heads}; {_nearest(self.kv_heads, fits)}"
            )
        return self


class OptimConfig(Config):
    lr: float = Field(gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    grad_clip: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _in_range(self) -> "OptimConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; the cosine only falls")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must each be at least 0 and below 1")
        return self


class ParallelConfig(Config):
    """How the ranks share the work; their product is the world. `layout.py` holds it to the world and the model."""

    dp_replicate: int | None = Field(
        default=None, ge=1
    )  # copies of the model; null: what the others leave of the world
    dp_shard: int = Field(default=1, ge=1)  # ranks that share one copy's weights, gradients and moments (FSDP2)
    cp: int = Field(default=1, ge=1)  # ranks that share a sequence
    tp: int = Field(default=1, ge=1)  # ranks that share each matrix, and the sequence between matrices
    pp: int = Field(default=1, ge=1)  # ranks that share the layers
    pp_schedule: Literal["1f1b", "interleaved"] = "1f1b"
    pp_stages_per_rank: int = Field(default=2, ge=2)  # of the interleaved schedule
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False

    @model_validator(mode="after")
    def _no_key_is_ignored(self) -> "ParallelConfig":
        if "pp_stages_per_rank" in self.model_fields_set and (self.pp == 1 or self.pp_schedule == "1f1b"):
            raise ValueError("pp_stages_per_rank is of the interleaved schedule; set pp above 1 and pp_schedule too")
        if self.pp_schedule == "interleaved" and self.pp == 1:
            raise ValueError("pp_schedule 'interleaved' without a pipeline; set pp above 1")
        return self


class LocalSgdConfig(Config):
    """Replicas that train apart and meet every few steps (DiLoCo); see `local_sgd.py`."""

    every_steps: int = Field(ge=1)
    outer_lr: float = Field(default=0.7, gt=0)
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    fragments: int = Field(default=1, ge=1)  # of the model, each synchronised at a step of its own
    overlap_steps: int = Field(default=0, ge=0)  # that go on while a fragment travels
    launches: int | None = Field(default=None, ge=2)  # each replica started apart, to die and return; `launches.py`
    lost_after_s: float = Field(default=15.0, gt=0)  # without a sign of life the others go on without such a replica

    @model_validator(mode="after")
    def _fits_between(self) -> "LocalSgdConfig":
        if self.fragments > self.every_steps:
            raise ValueError(
                f"fragments {self.fragments} are more than every_steps {self.every_steps}; lower fragments"
            )
        if self.overlap_steps >= self.every_steps:
            raise ValueError(
                f"overlap_steps {self.overlap_steps} must be below every_steps {self.every_steps}: a fragment has to "
                "arrive before it leaves again"
            )
        if self.launches and self.overlap_steps:
            raise ValueError(
                "overlap_steps is of replicas in one launch: what travels would be lost with one that dies"
            )
        if "lost_after_s" in self.model_fields_set and not self.launches:
            raise ValueError("lost_after_s is of replicas that are launches of their own; set launches too")
        return self


class RecoverConfig(Config):
    """What to do with a loss or gradients that are not finite, with a spike, and with a collective that hangs."""

    bad_step: Literal["stop", "skip"] = "stop"  # skip: back to the newest checkpoint, and past the batch
    spike_factor: float | None = Field(default=None, gt=1)  # a loss this many times the running mean is bad too
    max_skips: int = Field(default=3, ge=1)
    # Without a finished step for so long: dump all stacks and start again.
    hang_timeout_s: float = Field(default=600.0, gt=0, le=1e6)


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Config):
    """Adapters in the place of all weights; see `lora.py`."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    targets: tuple[LoraTarget, ...] = Field(default=typing.get_args(LoraTarget), min_length=1)
    export: Literal["merged", "adapters"] = "merged"  # a whole model, or the adapters beside the base's name


class CheckpointConfig(Config):
    every_steps: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_every_steps: int | None = Field(default=None, ge=1)  # of these steps all are kept


class PlanConfig(Config):
    """What the planner expects of one rank; the run's metrics say how far off it is."""

    peak_flops_per_rank: float | None = Field(default=None, gt=0)  # a second, dense, in the dtype of the products
    step_s: float | None = Field(default=None, gt=0)
    memory_bytes: float | None = Field(default=None, gt=0)


class TrainConfig(Config):
    model: ModelConfig
    seq: int = Field(ge=2)
    global_batch: int = Field(ge=1)  # sequences a step, over all ranks
    micro_batch: int = Field(ge=1)  # sequences at once on one rank
    steps: int = Field(ge=1)
    optim: OptimConfig
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    document_mask: bool = False  # no document of a window sees the one before it
    parallelism: ParallelConfig = ParallelConfig()
    local_sgd: LocalSgdConfig | None = None
    lora: LoraConfig | None = None  # with base=
    recover: RecoverConfig = RecoverConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every_steps: int = Field(default=10, ge=1)
    look_at_traffic_every_steps: int | None = Field(default=None, ge=1)  # of a step that is looked at, bytes and times
    plan: PlanConfig = PlanConfig()
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()  # beside log.jsonl

    @model_validator(mode="after")
    def _adapters_fit(self) -> "TrainConfig":
        if self.lora is not None and self.parallelism.tp > 1:
            raise ValueError(f"lora's small matrices are not split over tp {self.parallelism.tp}; use dp_shard instead")
        return self

    @model_validator(mode="after")
    def _replicas_stay_together(self) -> "TrainConfig":
        if self.local_sgd and self.local_sgd.launches and self.recover.bad_step == "skip":
            raise ValueError(
                "recover.bad_step 'skip' goes back alone, and local_sgd.launches go on together; use 'stop'"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "TrainConfig":
        if self.optim.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} is above steps {self.steps}: lr {self.optim.lr:g} would "
                f"never be reached; set it to at most {self.steps}"
            )
        return self

    @model_validator(mode="after")
    def _context_fits(self) -> "TrainConfig":
        if self.seq > self.model.max_context:
            raise ValueError(
                f"seq {self.seq} is longer than model.max_context {self.model.max_context}; "
                f"set seq to {self.model.max_context} or max_context to {self.seq}"
            )
        return self

    def grad_accum(self, world: int) -> int:
        """Micro-batches that each of `world` data-parallel ranks adds up for one step. Raises Refused when not whole."""
        share = self.micro_batch * world
        if self.global_batch % share == 0:
            return self.global_batch // share
        below = self.global_batch // share * share
        near = [batch for batch in (below, below + share) if batch]
        micro = [n for n in range(1, self.micro_batch + 1) if self.global_batch % (n * world) == 0]
        other = f", or micro_batch to {micro[-1]}" if micro else ""
        raise Refused(
            f"global_batch {self.global_batch} does not divide by micro_batch {self.micro_batch} x {world} ranks",
            where="global_batch",
            fix=f"Set global_batch to {' or '.join(map(str, near))}{other}.",
        )

    def run_digest(self) -> str:
        """Of all that decides the trained weights, to rounding: not how often a run saves, nor who computes what."""
        private = {"checkpoint", "log_every_steps", "look_at_traffic_every_steps", "micro_batch", "parallelism"}
        private |= {"plan", "recover", "sinks"}
        return digest_of(self.model_dump(mode="json", exclude=private))


class SampleConfig(Config):
    prompt: str = "def "
    max_tokens: int = Field(default=64, ge=0)


Baseline = Literal["unigram", "trigram", "kneser_ney_5"]


class MultipleChoiceTask(Config):
    """Lines of `{"question", "choices", "answer"}`; the answer is the number of a choice."""

    kind: Literal["multiple_choice"]
    name: str
    path: str
    max_rows: int = Field(default=1000, ge=1)


class ExactMatchTask(Config):
    """Lines of `{"question", "answer"}`; the first line that the model writes has to be the answer."""

    kind: Literal["exact_match"]
    name: str
    path: str
    max_rows: int = Field(default=1000, ge=1)
    max_tokens: int = Field(default=32, ge=1)


class HarnessTask(Config):
    """A task of lm-evaluation-harness by its name there, its own or one described in a YAML file in the folder `path`."""

    kind: Literal["lm_eval"]
    name: str
    task: str
    path: str | None = None
    metric: str = "acc"  # one that is a share of right answers
    few_shot: int = Field(default=0, ge=0)
    max_rows: int = Field(default=1000, ge=1)


class EvaluateConfig(Config):
    max_tokens: int = Field(default=100_000, ge=2)  # of the held-out text
    baselines: tuple[Baseline, ...] = ("unigram", "trigram", "kneser_ney_5")
    sample: SampleConfig = SampleConfig()
    tasks: tuple[Annotated[MultipleChoiceTask | ExactMatchTask | HarnessTask, Field(discriminator="kind")], ...] = ()

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "EvaluateConfig":
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names) or "classification" in names:
            raise ValueError(f"the names of tasks have to be distinct and not 'classification': {', '.join(names)}")
        return self


class GateConfig(Config):
    must_beat: Baseline | None = "trigram"
    max_bits_per_byte: float | None = Field(default=None, gt=0)
    min_accuracy: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}  # of tasks by name, or of `classification`


class PublishConfig(Config):
    gate: GateConfig = GateConfig()


def _nearest(value: int, fits: Sequence[int]) -> str:
    near = sorted(sorted(fits, key=lambda fit: abs(fit - value))[:2])
    return f"the nearest that fit are {' and '.join(map(str, near))}"
