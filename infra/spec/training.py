"""What is trained: data, model, the run, how it is judged and where the result is published."""

from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from infra.spec.base import MOST_NODES, OR_AUTO, Auto, Misplaced, Name, NonNegativeInt, PositiveFloat, PositiveInt, Spec
from infra.spec.data import Data, Located
from infra.spec.judging import CLASSIFICATION, Evaluate, Gate
from infra.spec.learning import Checkpoint, LocalSgd, Lora, Optim, Recover
from infra.spec.shape import ModelShape

HOST_NAME_MOST = 63
Dtype = Literal["auto", "float32", "bfloat16"]
Sink = Literal["tensorboard", "wandb"]


class PodResources(Spec):
    cpus: Annotated[float, Field(ge=0.01, le=1e6, allow_inf_nan=False)]
    """CPUs requested (and the limit)."""
    memory_gib: Annotated[float, Field(ge=0.01, le=1e6, allow_inf_nan=False)]
    """Memory requested and limit, GiB."""


class Base(Located):
    """A model package in Hugging Face layout (Llama, Mistral, Qwen2 or Qwen3) that training begins from.

    Its tokenizer, chat template and shape are taken over. One of the registry's volume is
    `{volume_claim: registry, path: models/NAME/DIGEST}`.
    """

    shape: str | None = None
    """Its shape for the plan: a model of the catalogue (`llama3-8b`, or one of $SLIPWAY_CATALOG). null: `training.model` says it,
    or its config.json where that lies on this machine."""

    @model_validator(mode="after")
    def _is_a_directory(self) -> Self:
        if self.url:
            raise Misplaced(
                f"{self.path!r} is a URL, and a package is read from a directory; copy it to a volume and name its claim",
                "path",
            )
        return self


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
    compile: bool = False
    """Compile each block at the first step (torch.compile): minutes once, faster steps. The image must have a C compiler."""

    @model_validator(mode="after")
    def _chunks_are_a_pipelines(self) -> Self:
        if self.vpp > 1 and self.pp == 1:
            raise Misplaced(f"{self.vpp} chunks of a pipeline stage, and no pipeline; set pp, or leave vpp out", "vpp")
        return self


class Training(Spec):
    name: Name
    """Name of the model: in the registry, in the API, in the names of the Jobs."""
    pool: Name
    """Node pool that it runs on."""
    nodes: Annotated[int, Field(ge=1, le=MOST_NODES)] = 1
    """Pods, one a node: the gang. With `local_sgd.launches` those of all of them together."""
    nproc_per_node: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Ranks in a pod; null: one for each GPU of the pool's instance."""
    parallelism: Annotated[Annotated[Parallelism, Tag("given")] | Auto, OR_AUTO] = Parallelism()
    """How the ranks share the work; `auto`: the fastest that fits the memory. Left out: every rank has the whole model."""
    deadline_h: PositiveFloat | None = None
    """Hours within which the run must end: what `instance: auto` of its pool is chosen by."""
    resources: PodResources | None = None
    """CPU and memory of a pod; null: what the instance allows."""
    data: Data
    """Corpus and tokenizer."""
    model: ModelShape | None = None
    """Shape of the model. With `base` the package has one, and this is what the plan computes with."""
    base: Base | None = None
    """Package to tune; null: weights begin at random."""
    lora: Lora | None = None
    """Train adapters and not all weights; null: all. Needs `base`."""
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
    document_mask: bool = False
    """No document of a window sees the one before it; chats and texts to classify never do."""
    local_sgd: LocalSgd | None = None
    """Replicas that train apart and meet every few steps; null: gradients are averaged at every step."""
    checkpoint: Checkpoint = Checkpoint()
    """When to save."""
    recover: Recover = Recover()
    """What to do when a step goes wrong."""
    log_every_steps: PositiveInt = 10
    """Steps between log lines."""
    look_at_traffic_every_steps: PositiveInt | None = None
    """Steps between two whose communication is measured, by collective; null: none is."""
    sinks: tuple[Sink, ...] = ()
    """Where the log goes besides the metrics: TensorBoard files in the run; Weights & Biases by the key in `secret`."""
    secret: Name | None = None
    """Secret of the namespace whose keys are environment variables of the training pods: `WANDB_API_KEY`."""
    max_restarts: NonNegativeInt = 6
    """Failed pods (by index) and ranks that are started again before the run counts as failed."""
    evaluate: Evaluate = Evaluate()
    """How the result is measured."""
    gate: Gate = Gate()
    """What it must reach to be published."""
    channel: Name = "production"
    """Registry channel that is moved to the new digest when the gate passes."""

    @property
    def launches(self) -> int:
        """Gangs that train apart and meet, each a Job of its own."""
        return (self.local_sgd and self.local_sgd.launches) or 1

    @property
    def exports_adapters(self) -> bool:
        """Whether what it publishes is a model only beside its base."""
        return self.lora is not None and self.lora.export == "adapters"

    @property
    def meets(self) -> bool:
        """Whether there is more than one of them, which need a place to meet."""
        return self.launches > 1

    @property
    def nodes_of_launch(self) -> int:
        """Pods of one gang."""
        return self.nodes // self.launches

    @property
    def layout(self) -> Parallelism:
        """`parallelism`, once the planner has chosen what was left to it."""
        assert isinstance(self.parallelism, Parallelism), "resolve the stack first (infra.planner.resolve)"
        return self.parallelism

    @property
    def shape(self) -> ModelShape:
        """`model`, once the planner knows that of `base`."""
        assert self.model, "resolve the stack first (infra.planner.resolve)"
        return self.model

    @property
    def located(self) -> dict[str, Located]:
        """All that lies somewhere, by its key in the stack file."""
        found = {f"training.data.{'.'.join(map(str, keys))}": source for keys, source in self.data.sources}
        places: dict[str, Located] = {key: source for key, source in found.items() if isinstance(source, Located)}
        places |= {f"training.evaluate.tasks.{name}": place for name, place in self.evaluate.located.items()}
        return places | ({"training.base": self.base} if self.base else {})

    @model_validator(mode="after")
    def _begins_somewhere(self) -> Self:
        if not self.model and not self.base:
            raise Misplaced("give `model`, a shape to train from random weights, or `base`, a package to tune", "model")
        if self.lora and not self.base:
            raise Misplaced("adapters of random weights learn nothing; name the package to tune as `base`", "lora")
        if self.base and self.model and self.base.shape:
            raise Misplaced("`model` says the shape already; leave one of them out", "base", "shape")
        if self.base and not self.model and "vocab_size" in self.data.model_fields_set:
            raise Misplaced("the vocabulary is the base package's; leave it out", "data", "vocab_size")
        if self.model and self.seq > self.model.max_context:
            raise Misplaced(
                f"seq {self.seq} is above model.max_context {self.model.max_context}; lower seq or raise max_context",
                "seq",
            )
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.optim.warmup_steps > self.steps:
            raise Misplaced(
                f"{self.optim.warmup_steps} is above steps {self.steps}: lr {self.optim.lr:g} would never be reached; "
                f"set it to at most {self.steps}",
                "optim",
                "warmup_steps",
            )
        return self

    @model_validator(mode="after")
    def _can_be_spread(self) -> Self:
        if isinstance(self.parallelism, Parallelism):
            tp = self.parallelism.tp
            if self.lora and tp > 1:
                raise Misplaced(f"adapters are not split over tp {tp}; shard with fsdp instead", "parallelism", "tp")
        if self.nodes % self.launches:
            near = [n * self.launches for n in (self.nodes_of_launch, self.nodes_of_launch + 1) if n]
            raise Misplaced(
                f"{self.nodes} nodes do not divide by local_sgd.launches {self.launches}; "
                f"the nearest: {' and '.join(map(str, near))}",
                "nodes",
            )
        # `train-NAME-DIGEST-LAUNCH-INDEX`
        longest = len(f"train-{self.name}-0123456789-{self.launches - 1}-{self.nodes_of_launch - 1}")
        if self.meets and longest > HOST_NAME_MOST:
            raise Misplaced(
                f"pods of the launches would be called by {longest} characters, and a host name has {HOST_NAME_MOST}; "
                f"shorten it by {longest - HOST_NAME_MOST}",
                "name",
            )
        if self.meets and self.recover.bad_step == "skip":
            raise Misplaced(
                "goes back alone, and local_sgd.launches go on together; stop, or leave launches out",
                "recover",
                "bad_step",
            )
        if "wandb" in self.sinks and not self.secret:
            raise Misplaced("Weights & Biases asks for a key; name the Secret that has WANDB_API_KEY", "secret")
        return self

    @model_validator(mode="after")
    def _can_be_judged(self) -> Self:
        """A gate that could never open would be found out when the training has been paid for."""
        kind, gate = self.data.task.kind, self.gate
        if gate.must_beat and kind != "text":
            instead = "min_accuracy: {classification: 0.9}" if kind == "classify" else "max_bits_per_byte"
            raise Misplaced(
                f"n-gram models say nothing of task {kind}; set must_beat: null and, for example, {instead}",
                "gate",
                "must_beat",
            )
        if gate.must_beat and gate.must_beat not in self.evaluate.baselines:
            raise Misplaced(f"{gate.must_beat} is not among evaluate.baselines; add it there", "gate", "must_beat")
        if kind == "classify":
            self._judges_classes()
        measured = [CLASSIFICATION] if kind == "classify" else [task.name for task in self.evaluate.tasks]
        for name in gate.min_accuracy:
            if name not in measured:
                there = f"there is {', '.join(measured)}" if measured else "evaluate.tasks is empty"
                raise Misplaced(f"nothing measures an accuracy of {name!r}; {there}", "gate", "min_accuracy", name)
        return self

    def _judges_classes(self) -> None:
        if self.gate.max_bits_per_byte:
            raise Misplaced("a classifier has no bits per byte; set min_accuracy", "gate", "max_bits_per_byte")
        if self.evaluate.tasks:
            raise Misplaced("a classifier writes no answers; leave tasks out", "evaluate", "tasks")
        if self.evaluate.sample:
            raise Misplaced("a classifier writes no text; leave sample out", "evaluate", "sample")
