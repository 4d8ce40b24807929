"""How a model is judged: what is measured of it, and what it must reach to be published."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infra.spec.base import Misplaced, Name, PositiveFloat, PositiveInt, Spec
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


Questions = Annotated[MultipleChoice | ExactMatch, Field(discriminator="kind")]


class Evaluate(Spec):
    max_tokens: PositiveInt = 200_000
    """Held-out tokens that are scored."""
    baselines: tuple[Baseline, ...] = ("unigram", "trigram", "kneser_ney_5")
    """n-gram models trained on the same tokens, so that a broken trainer can't look well. Of texts only."""
    sample: Sample | None = None
    """A completion to show."""
    tasks: tuple[Questions, ...] = ()
    """Questions whose accuracy is measured too."""

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
