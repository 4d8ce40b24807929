"""What a dataset is made of: where the text lies, what a row is for, and how sources are mixed."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config import Config


class StdlibSource(Config):
    """The Python standard library's own source, which is wherever Python is."""

    kind: Literal["python-stdlib"]


class TextSource(Config):
    """UTF-8 files under a directory or any fsspec URL; one file is one document."""

    kind: Literal["text"]
    path: str
    glob: str = "**/*.txt"


class JsonlSource(Config):
    """One JSON object a line, compressed (.gz, .zst, …) or not; one line is one document."""

    kind: Literal["jsonl"]
    path: str
    glob: str = "**/*.jsonl"


class ParquetSource(Config):
    kind: Literal["parquet"]
    path: str
    glob: str = "**/*.parquet"


class DatasetsSource(Config):
    """A split that Hugging Face `datasets` wrote with `save_to_disk`."""

    kind: Literal["datasets"]
    path: str


Source = Annotated[
    StdlibSource | TextSource | JsonlSource | ParquetSource | DatasetsSource, Field(discriminator="kind")
]


class TextTask(Config):
    """Every token is to be learnt; documents are joined by the end of text."""

    kind: Literal["text"]
    field: str = "text"

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)


class ChatTask(Config):
    """Rows of `[{"role", "content"}, …]`; only what the assistant says is to be learnt.

    What a row has in `tools` (descriptions of functions, or their JSON) the template is told.
    """

    kind: Literal["chat"]
    field: str = "messages"

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)


class ClassifyTask(Config):
    """Rows of a text and its class: the name of one of `labels`, or its number."""

    kind: Literal["classify"]
    text: str = "text"
    label: str = "label"
    labels: tuple[str, ...] = Field(min_length=2)

    @property
    def fields(self) -> tuple[str, ...]:
        return self.text, self.label


Task = Annotated[TextTask | ChatTask | ClassifyTask, Field(discriminator="kind")]


class MixturePart(Config):
    name: str
    weight: float = Field(gt=0)  # of the samples, relative to the others'
    source: Source


class DataConfig(Config):
    source: Source | None = None
    mixture: tuple[MixturePart, ...] = ()  # in the place of one source
    task: Task = TextTask(kind="text")
    vocab_size: int = Field(default=1024, ge=257, le=1 << 20)  # 256 bytes and the end of text; unused with base=
    held_out: float = Field(default=0.05, gt=0, lt=0.5)
    seed: int = 0

    @model_validator(mode="after")
    def _sources_fit(self) -> "DataConfig":
        if (self.source is None) == (not self.mixture):
            raise ValueError("give either source or mixture, a list of name, weight and source")
        names = [part.name for part in self.mixture]
        if len(set(names)) < len(names):
            raise ValueError(f"the names of mixture are not distinct: {', '.join(names)}")
        rows = (JsonlSource, ParquetSource, DatasetsSource)
        bare = [part.source.kind for part in self.parts if not isinstance(part.source, rows)]
        if bare and self.task.kind != "text":
            raise ValueError(
                f"task {self.task.kind} needs rows with fields, and source {bare[0]} has none; use jsonl or parquet"
            )
        return self

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """The mixture; one source is a mixture of one."""
        return self.mixture if self.source is None else (MixturePart(name="source", weight=1.0, source=self.source),)
