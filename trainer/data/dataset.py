"""Reading a dataset: its manifest, and its tokens as arrays that are mapped from the shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from tokenizers import Tokenizer

from trainer.errors import Refused
from trainer.files import read_json, sha256_of_file

Split = Literal["train", "heldout"]


class _File(BaseModel):
    bytes: int
    sha256: str


class _Counts(BaseModel):
    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    learnt: NonNegativeInt


class _Shards(BaseModel):
    shards: list[str]


class _Source(BaseModel):
    name: str
    weight: PositiveFloat
    splits: dict[Split, _Shards]


class Manifest(BaseModel):
    """What readers need of `manifest.json`."""

    config_digest: str | None = None  # what it was made from, which `make_dataset` asks
    data_digest: str
    dtype: Literal["uint16", "uint32"]
    end_of_text: NonNegativeInt
    end_of_turn: NonNegativeInt | None = None
    files: dict[str, _File]
    labels: list[str] | None
    sources: list[_Source]
    splits: dict[Split, _Counts]
    task: Literal["text", "chat", "classify"]
    vocab_size: PositiveInt


class TokenStream:
    """The values of several files as one long array."""

    def __init__(self, shards: list[Path], *, dtype: np.dtype) -> None:
        self._shards = [np.memmap(path, dtype=dtype, mode="r") for path in shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Values [start, start + length) as int64, shape (length,)."""
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while length:
            begin = start - int(self._ends[shard]) + len(self._shards[shard])
            part = self._shards[shard][begin : begin + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Examples:
    """The chats or classified texts of one source: tokens, what is to be learnt at each (-100: nothing), and their ends."""

    tokens: TokenStream
    targets: TokenStream
    ends: np.ndarray  # (examples,) int64

    def __len__(self) -> int:
        return len(self.ends)

    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def read(self, number: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets [start, start + length) of one example."""
        begin = (int(self.ends[number - 1]) if number else 0) + start
        return self.tokens.read(begin, length), self.targets.read(begin, length)


@dataclass(frozen=True)
class Dataset:
    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> "Dataset":
        """Raises Refused for a directory that holds no whole dataset."""
        fix = "Make it with python -m trainer.data."
        found = read_json(directory / "manifest.json")
        if found is None or "splits" not in found:
            raise Refused("there is no dataset", where=str(directory), fix=fix)
        try:
            manifest = Manifest.model_validate(found)
        except ValidationError as errors:
            error = errors.errors(include_url=False)[0]
            what = (
                f"the dataset is of an older form, or was changed: {'.'.join(map(str, error['loc']))}: {error['msg']}"
            )
            raise Refused(what, where=str(directory / "manifest.json"), fix=fix) from None
        for name, entry in manifest.files.items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                raise Refused("the dataset is not whole: this file is absent or cut", where=str(path), fix=fix)
            if verify and sha256_of_file(path) != entry.sha256:
                raise Refused("the file is not the one that the manifest describes", where=str(path), fix=fix)
        return cls(directory, manifest)

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def end_of_text(self) -> int:
        return self.manifest.end_of_text

    @property
    def digest(self) -> str:
        return self.manifest.data_digest

    @property
    def task(self) -> str:
        """`text`, `chat` or `classify`."""
        return self.manifest.task

    @property
    def labels(self) -> list[str] | None:
        """The names of the classes, where the task is to tell them."""
        return self.manifest.labels

    @property
    def weights(self) -> list[float]:
        """How often each source is drawn from, relative to the others."""
        return [source.weight for source in self.manifest.sources]

    @property
    def ends(self) -> set[int]:
        """The tokens at which a writer stops: the end of text and those that the package or the template has besides."""
        said = (read_json(self.directory / "generation_config.json") or {}).get("eos_token_id") or []
        more = [*(said if isinstance(said, list) else [said]), self.manifest.end_of_turn]
        return {self.end_of_text, *(end for end in more if end is not None)}

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.directory / "tokenizer.json"))

    def tokens(self, split: Split, *, source: int | None = None) -> TokenStream:
        """The tokens of a split, of one source or of all, one after another."""
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        return TokenStream(self._files(split, source, "bin"), dtype=dtype)

    def examples(self, split: Split, *, source: int | None = None) -> Examples:
        """The examples of a split; there are some where the task is not `text`."""
        ends, before = [np.empty(0, dtype=np.int64)], 0
        for path in self._files(split, source, "ends.bin"):
            ends.append(np.fromfile(path, dtype="<i8") + before)
            before = int(ends[-1][-1])
        targets = TokenStream(self._files(split, source, "targets.bin"), dtype=np.dtype("<i4"))
        return Examples(self.tokens(split, source=source), targets, np.concatenate(ends))

    def _files(self, split: Split, source: int | None, ending: str) -> list[Path]:
        sources = self.manifest.sources if source is None else [self.manifest.sources[source]]
        return [self.directory / f"{shard}.{ending}" for each in sources for shard in each.splits[split].shards]
