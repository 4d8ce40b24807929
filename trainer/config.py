"""What a program is told: one frozen, validated class for each. `command.py` reads them."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.errors import Refused
from trainer.files import digest_of


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def digest(self) -> str:
        return digest_of(self.model_dump(mode="json"))


class StdlibSource(Config):
    """The Python standard library's own source, which is wherever Python is."""

    kind: Literal["python-stdlib"]


class TextSource(Config):
    """UTF-8 files under a directory or any fsspec URL; one file is one document."""

    kind: Literal["text"]
    path: str
    glob: str = "**/*.txt"


class DataConfig(Config):
    source: Annotated[StdlibSource | TextSource, Field(discriminator="kind")]
    vocab_size: int = Field(default=1024, ge=257, le=1 << 20)  # 256 bytes and the end of text
    held_out: float = Field(default=0.05, gt=0, lt=0.5)
    seed: int = 0


class ModelConfig(Config):
    """The shape of a Llama-family decoder; the size of the vocabulary comes with the dataset."""

    layers: int = Field(ge=1)
    hidden: int = Field(ge=2)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    ffn: int = Field(ge=1)
    max_context: int = Field(ge=2)
    tied_embeddings: bool = True
    rope_theta: float = Field(default=10_000.0, gt=0)
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


class CheckpointConfig(Config):
    every_steps: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)


class TrainConfig(Config):
    model: ModelConfig
    seq: int = Field(ge=2)
    global_batch: int = Field(ge=1)  # sequences a step, over all ranks
    micro_batch: int = Field(ge=1)  # sequences at once on one rank
    steps: int = Field(ge=1)
    optim: OptimConfig
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every_steps: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _context_fits(self) -> "TrainConfig":
        if self.seq > self.model.max_context:
            raise ValueError(
                f"seq {self.seq} is longer than model.max_context {self.model.max_context}; "
                f"set seq to {self.model.max_context} or max_context to {self.seq}"
            )
        return self

    def grad_accum(self, world: int) -> int:
        """Micro-batches that each of `world` ranks adds up for one step. Raises Refused when that is not whole."""
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
        """Of all that decides the trained weights: how often a run logs or saves does not."""
        return digest_of(self.model_dump(mode="json", exclude={"checkpoint", "log_every_steps"}))


class SampleConfig(Config):
    prompt: str = "def "
    max_tokens: int = Field(default=64, ge=0)


Baseline = Literal["unigram", "trigram", "kneser_ney_5"]


class EvaluateConfig(Config):
    max_tokens: int = Field(default=100_000, ge=2)  # of the held-out text
    baselines: tuple[Baseline, ...] = ("unigram", "trigram", "kneser_ney_5")
    sample: SampleConfig = SampleConfig()


class GateConfig(Config):
    must_beat: Baseline | None = "trigram"
    max_bits_per_byte: float | None = Field(default=None, gt=0)


class PublishConfig(Config):
    gate: GateConfig = GateConfig()


def _nearest(value: int, fits: Sequence[int]) -> str:
    near = sorted(sorted(fits, key=lambda fit: abs(fit - value))[:2])
    return f"the nearest that fit are {' and '.join(map(str, near))}"
