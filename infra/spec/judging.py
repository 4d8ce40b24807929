"""How a model is judged: what is measured of it, and what it must reach to be published."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infra.spec.base import Misplaced, Name, NonNegativeInt, PositiveFloat, PositiveInt, Spec
from infra.spec.data import Located

Baseline = Literal["unigram", "trigram", "kneser_ney_5"]
Accuracy = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
CLASSIFICATION = "classification"
"""The accuracy of a classifier on held-out rows, by the name that a gate calls it."""


class Sample(Spec):
    prompt: str
    """What the trained model completes in its report."""
    max_tokens: PositiveInt = 64
    """Length of the completion."""


class MultipleChoice(Located):
    """JSON lines of `{"question", "choices", "answer"}`; the answer is the number of a choice."""

    kind: Literal["multiple_choice"]
    """The choice that is likeliest a byte."""
    name: Name
    """What the report and the gate call it."""
    max_rows: PositiveInt = 1000
    """Questions at most."""


class ExactMatch(Located):
    """JSON lines of `{"question", "answer"}`; the first line that the model writes has to be the answer."""

    kind: Literal["exact_match"]
    """What the model writes."""
    name: Name
    """What the report and the gate call it."""
    max_rows: PositiveInt = 1000
    """Questions at most."""
    max_tokens: PositiveInt = 32
    """Length of an answer."""


class Harness(Spec):
    """A task of lm-evaluation-harness: its own, whose data it fetches from the Hugging Face hub, or one described in `path`."""

    kind: Literal["lm_eval"]
    """As the harness asks and counts."""
    name: Name
    """What the report and the gate call it."""
    task: str
    """What the harness calls it: `arc_easy`."""
    path: str | None = Field(default=None, min_length=1)
    """Folder with a YAML description of the task and its data, of this machine or in `volume_claim`; null: the harness's own."""
    volume_claim: Name | None = None
    """PersistentVolumeClaim of the namespace in which `path` lies."""
    metric: str = "acc"
    """A metric of the task that is a share of right answers."""
    few_shot: NonNegativeInt = 0
    """Examples before each question."""
    max_rows: PositiveInt = 1000
    """Questions at most."""

    @model_validator(mode="after")
    def _is_a_folder(self) -> Self:
        if self.place is not None and self.place.url:
            raise Misplaced(f"{self.path!r} is a URL, and the harness reads a folder; name a volume_claim", "path")
        if self.volume_claim and self.path is None:
            raise Misplaced("a volume, and no path in it; give `path`", "volume_claim")
        return self

    @property
    def place(self) -> Located | None:
        """Where the description lies, if anywhere."""
        return None if self.path is None else Located(path=self.path, volume_claim=self.volume_claim)


Questions = Annotated[MultipleChoice | ExactMatch | Harness, Field(discriminator="kind")]
HUB = "https://huggingface.co"
"""Where the harness's own tasks have their data."""


class Evaluate(Spec):
    max_tokens: PositiveInt = 200_000
    """Held-out tokens that are scored."""
    baselines: tuple[Baseline, ...] = ("unigram", "trigram", "kneser_ney_5")
    """n-gram models trained on the same tokens, so that a broken trainer can't look well. Of texts only."""
    sample: Sample | None = None
    """A completion to show."""
    tasks: tuple[Questions, ...] = ()
    """Questions whose accuracy is measured too."""

    @property
    def located(self) -> dict[str, Located]:
        """Questions that lie somewhere, by the name of their task."""
        places = {task.name: task.place if isinstance(task, Harness) else task for task in self.tasks}
        return {name: place for name, place in places.items() if place}

    @property
    def asks_harness(self) -> bool:
        """Whether lm-evaluation-harness has to be installed."""
        return any(isinstance(task, Harness) for task in self.tasks)

    @property
    def urls(self) -> tuple[str, ...]:
        """What is opened over the network."""
        fetches = any(isinstance(task, Harness) and not task.path for task in self.tasks)
        return (*(place.url for place in self.located.values() if place.url), *((HUB,) if fetches else ()))

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        names = [task.name for task in self.tasks]
        for index, name in enumerate(names):
            if name in names[:index] or name == CLASSIFICATION:
                raise Misplaced(f"{name!r} is taken; choose another name", "tasks", index, "name")
        return self


class Gate(Spec):
    must_beat: Baseline | None = "trigram"
    """Baseline that the model's bits per byte must be below; null: none, as chats and classes need it."""
    max_bits_per_byte: PositiveFloat | None = None
    """Upper bound of the model's bits per byte on held-out text."""
    min_accuracy: dict[str, Accuracy] = Field(default={})
    """Least share that must be right, by the name of one of `evaluate.tasks`, or of a classifier by `classification`."""
