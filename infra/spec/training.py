"""What is trained: data, model shape, the run, how it is judged and where the result is published."""

from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from infra.spec.base import (
    OR_AUTO,
    Auto,
    Misplaced,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
    Spec,
)

Dtype = Literal["auto", "float32", "bfloat16"]
Baseline = Literal["unigram", "trigram", "kneser_ney_5"]


class PythonStdlib(Spec):
    kind: Literal["python-stdlib"]
    """The source of Python's standard library: real text that is on every machine."""


class TextFiles(Spec):
    kind: Literal["text"]
    """UTF-8 text files."""
    path: str
    """Directory or fsspec URL."""
    glob: str = "**/*.txt"
    """Which files below it."""


class Data(Spec):
    source: PythonStdlib | TextFiles = Field(discriminator="kind")
    """Where the corpus comes from."""
    vocab_size: PositiveInt = 1024
    """Size of the byte-level BPE vocabulary that is trained on it."""
    held_out: Share = 0.05
    """Share of the files that training never sees."""
    seed: NonNegativeInt = 0
    """Which files are held out."""


class ModelShape(Spec):
    """A Llama-family decoder."""

    layers: PositiveInt
    """Transformer blocks."""
    hidden: PositiveInt
    """Width of the residual stream."""
    heads: PositiveInt
    """Query heads."""
    kv_heads: PositiveInt
    """Key/value heads (grouped-query attention); divides `heads`."""
    head_dim: PositiveInt | None = None
    """Width of a head; null: hidden / heads."""
    ffn: PositiveInt
    """Inner width of the gated MLP."""
    max_context: PositiveInt
    """Positions; written once, the server's longest context follows it."""
    tied_embeddings: bool = True
    """Input and output embeddings are one matrix."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding's wavelengths."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_dim is None and self.hidden % self.heads:
            raise Misplaced(
                f"hidden {self.hidden} is not a multiple of heads {self.heads}; set `head_dim` or change one", "hidden"
            )
        if self.heads % self.kv_heads:
            divisors = [k for k in range(1, self.heads + 1) if self.heads % k == 0]
            nearest = min(divisors, key=lambda k: abs(k - self.kv_heads))
            raise Misplaced(
                f"kv_heads {self.kv_heads} does not divide heads {self.heads}; the nearest that does is {nearest}",
                "kv_heads",
            )
        return self

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden // self.heads


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


class Checkpoint(Spec):
    every_steps: PositiveInt = 500
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""


class Sample(Spec):
    prompt: str
    """What the trained model completes in its report."""
    max_tokens: PositiveInt = 64
    """Length of the completion."""


class Evaluate(Spec):
    max_tokens: PositiveInt = 200_000
    """Held-out tokens that are scored."""
    baselines: tuple[Baseline, ...] = ("unigram", "trigram", "kneser_ney_5")
    """n-gram models trained on the same tokens, so that a broken trainer can't look well."""
    sample: Sample | None = None
    """A completion to show."""


class Gate(Spec):
    must_beat: Baseline | None = "trigram"
    """Baseline that the model's bits per byte must be below."""
    max_bits_per_byte: PositiveFloat | None = None
    """Upper bound of the model's bits per byte on held-out text."""


class PodResources(Spec):
    cpus: PositiveFloat
    """CPUs requested (and the limit)."""
    memory_gib: PositiveFloat
    """Memory requested and limit, GiB."""


class Parallelism(Spec):
    """How the ranks share the work; data-parallel replicas fill up what fsdp × tp × pp × cp leaves."""

    fsdp: PositiveInt = 1
    """Ranks that shard weights, gradients and optimizer (FSDP, ZeRO-3)."""
    tp: PositiveInt = 1
    """Ranks that split each matrix product (tensor and sequence parallel); divides the model's heads."""
    pp: PositiveInt = 1
    """Pipeline stages; at most the model's layers."""
    cp: PositiveInt = 1
    """Ranks that split a sequence."""
    vpp: PositiveInt = 1
    """Model chunks of a pipeline stage (interleaved 1F1B)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass."""


class Training(Spec):
    name: Name
    """Name of the model: in the registry, in the API, in the names of the Jobs."""
    pool: Name
    """Node pool that it runs on."""
    nodes: PositiveInt = 1
    """Pods, one a node: the gang."""
    nproc_per_node: PositiveInt | None = None
    """Ranks in a pod; null: one for each GPU of the pool's instance."""
    parallelism: Annotated[Annotated[Parallelism, Tag("given")] | Auto, OR_AUTO] = Parallelism()
    """How the ranks share the work; `auto`: the fastest that fits the memory. Left out: every rank has the whole model."""
    deadline_h: PositiveFloat | None = None
    """Hours within which the run must end: what `instance: auto` of its pool is chosen by."""
    resources: PodResources | None = None
    """CPU and memory of a pod; null: what the instance allows."""
    data: Data
    """Corpus and tokenizer."""
    model: ModelShape
    """Shape of the model."""
    seq: PositiveInt
    """Tokens in a training sequence."""
    global_batch: PositiveInt
    """Sequences in an optimizer step, over all ranks."""
    micro_batch: PositiveInt
    """Sequences in a forward pass of one rank."""
    steps: PositiveInt
    """Optimizer steps."""
    optim: Optim
    """Optimizer and schedule."""
    dtype: Dtype = "auto"
    """Compute type; `auto` takes bfloat16 where the hardware has it."""
    seed: NonNegativeInt = 0
    """Initialisation and order of the data."""
    checkpoint: Checkpoint = Checkpoint()
    """When to save."""
    log_every_steps: PositiveInt = 10
    """Steps between log lines."""
    max_restarts: NonNegativeInt = 6
    """Failed pods (by index) and ranks that are started again before the run counts as failed."""
    evaluate: Evaluate = Evaluate()
    """How the result is measured."""
    gate: Gate = Gate()
    """What it must reach to be published."""
    channel: Name = "production"
    """Registry channel that is moved to the new digest when the gate passes."""

    @property
    def layout(self) -> Parallelism:
        """`parallelism`, once the planner has chosen what was left to it."""
        assert isinstance(self.parallelism, Parallelism), "resolve the stack first (infra.planner.resolve)"
        return self.parallelism

    @model_validator(mode="after")
    def _sequence_fits(self) -> Self:
        if self.seq > self.model.max_context:
            raise Misplaced(
                f"seq {self.seq} is above model.max_context {self.model.max_context}; lower seq or raise max_context",
                "seq",
            )
        return self
