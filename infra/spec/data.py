"""What a model learns from: where the rows lie, what each is for, and how sources are mixed."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infra.spec.base import Misplaced, Name, NonNegativeInt, PositiveFloat, Spec

ROOT = Path(__file__).parents[2]
HeldOut = Annotated[float, Field(gt=0, lt=0.5, allow_inf_nan=False)]
VocabSize = Annotated[int, Field(ge=257, le=1 << 20)]  # 256 bytes and the end of text


class Located(Spec):
    """Something that lies in an object store, in a volume of the namespace or in a directory of this machine."""

    path: str = Field(min_length=1)
    """Directory or file. An fsspec URL (`s3://acme-corpora/code`); with `volume_claim` a path inside that volume; else a path
    of this machine, from the checkout on where it is relative, which `slipway local` reads and a cluster refuses."""
    volume_claim: Name | None = None
    """PersistentVolumeClaim of the namespace in which `path` lies, made outside of this stack; `registry` is the stack's own."""

    @model_validator(mode="after")
    def _is_inside_its_volume(self) -> Self:
        path = PurePosixPath(self.path)
        if self.volume_claim and ("://" in self.path or path.is_absolute() or ".." in path.parts):
            raise Misplaced(
                f"{self.path!r} is no path inside volume {self.volume_claim!r}; write it as `dir/file`", "path"
            )
        if self.path.startswith("file://"):
            raise Misplaced(f"{self.path!r} is a path of this machine; write it without file://", "path")
        return self

    @property
    def url(self) -> str | None:
        """`path` where it is reached over the network."""
        return self.path if "://" in self.path else None

    @property
    def here(self) -> Path | None:
        """`path` where it is one of this machine, absolute."""
        return None if self.url or self.volume_claim else ROOT / Path(self.path).expanduser()


class PythonStdlib(Spec):
    kind: Literal["python-stdlib"]
    """The source of Python's standard library: real text that is on every machine."""


class TextFiles(Located):
    """UTF-8 text; one file is one document."""

    kind: Literal["text"]
    """UTF-8 text files."""
    glob: str = "**/*.txt"
    """Which files below it."""


class JsonLines(Located):
    """One JSON object a line, compressed (.gz, .bz2, .xz) or not; one line is one document."""

    kind: Literal["jsonl"]
    """JSON lines."""
    glob: str = "**/*.jsonl"
    """Which files below it."""


class Parquet(Located):
    """Parquet files; one row is one document."""

    kind: Literal["parquet"]
    """Parquet files."""
    glob: str = "**/*.parquet"
    """Which files below it."""


class HuggingFaceDataset(Located):
    """A split that Hugging Face `datasets` wrote with `save_to_disk`."""

    kind: Literal["datasets"]
    """A Hugging Face dataset on disk."""


Source = Annotated[PythonStdlib | TextFiles | JsonLines | Parquet | HuggingFaceDataset, Field(discriminator="kind")]


class TextTask(Spec):
    """Every token is to be learnt; documents are joined by the end of text."""

    kind: Literal["text"]
    """Next-token prediction."""
    field: str = "text"
    """Field of a row that holds the text."""


class ChatTask(Spec):
    """Supervised fine-tuning on rows of `[{"role", "content"}, …]`: only what the assistant says is to be learnt."""

    kind: Literal["chat"]
    """Chats by a chat template: the base package's, else ChatML."""
    field: str = "messages"
    """Field of a row that holds the messages."""


class ClassifyTask(Spec):
    """Rows of a text and its class."""

    kind: Literal["classify"]
    """Sequence classification by cross-entropy."""
    text: str = "text"
    """Field of a row that holds the text."""
    label: str = "label"
    """Field that holds its class: the name of one of `labels`, or its number."""
    labels: tuple[str, ...] = Field(min_length=2)
    """Names of the classes, in the order of their numbers."""


Task = Annotated[TextTask | ChatTask | ClassifyTask, Field(discriminator="kind")]
TEXT = TextTask(kind="text")


class MixturePart(Spec):
    """One source among several."""

    name: Name
    """What it is called in logs and in the dataset's manifest."""
    weight: PositiveFloat
    """Share of the samples, relative to the others' weights."""
    source: Source
    """Where it lies."""


class Data(Spec):
    source: Source | None = None
    """Where the corpus comes from. Its name is its identity: a corpus that has changed under the same path is not read again."""
    mixture: tuple[MixturePart, ...] = ()
    """Several sources with weights, in the place of `source`."""
    task: Task = TEXT
    """What a row is for: `text`, `chat` or `classify`."""
    vocab_size: VocabSize = 1024
    """Size of the byte-level BPE vocabulary that is trained on it; with `training.base` the package's own is used."""
    held_out: HeldOut = 0.05
    """Share of the files (of a source of rows: of the rows) that training never sees."""
    seed: NonNegativeInt = 0
    """Which files are held out."""

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        if self.source and self.mixture:
            raise Misplaced("source and mixture are both there; a mixture of one is the same as a source", "mixture")
        if not self.source and not self.mixture:
            raise Misplaced("give `source`, or `mixture`: a list of name, weight and source", "source")
        names = [part.name for part in self.mixture]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise Misplaced(f"{name!r} is the name of an earlier part; names must differ", "mixture", index, "name")
        for keys, source in self.sources:
            if self.task.kind != "text" and isinstance(source, PythonStdlib | TextFiles):
                raise Misplaced(
                    f"task {self.task.kind} needs rows with fields, and {source.kind} has none; use jsonl, parquet or datasets",
                    *keys,
                )
        return self

    @property
    def sources(self) -> tuple[tuple[tuple[str | int, ...], Source], ...]:
        """Every source with the keys that lead to it."""
        if self.source:
            return ((("source",), self.source),)
        return tuple((("mixture", index, "source"), part.source) for index, part in enumerate(self.mixture))
