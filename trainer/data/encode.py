"""One part of a source into shards of tokens: what every process does, alone, with the same result as any other.

Text becomes one stream of tokens. Chats and classes stay examples: their tokens, for each position what is to be learnt
there (-100: nothing), and where each example ends.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trainer.data.chat import ChatTemplate
from trainer.data.config import ChatTask, ClassifyTask, Source, Task, TextTask
from trainer.data.sources import Part, Reader, Row
from trainer.errors import Refused

SPLITS = ("train", "heldout")
SHARD_TOKENS = 1 << 27
NOTHING = -100  # what cross-entropy leaves out
_BATCH_ROWS, _BATCH_CHARACTERS = 64, 8 << 20


@dataclass(frozen=True)
class Job:
    source: Source
    part: Part
    task: Task
    held_out: float
    seed: int
    cut_each: bool  # hold out the end of every document in the place of whole documents
    tokenizer: Path
    end_of_text: int
    template: str | None
    bos: str
    eos: str
    dtype: str
    out: Path


@dataclass
class Done:
    """What came of a part: of each split the counts and the number of shards, which are `out/<split>-NNNNN.bin`."""

    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: int = 0


def encode_part(job: Job, report: Callable[[int], None] = lambda _bytes: None) -> Done:
    """Writes the shards of a part into `job.out`; `report` hears the bytes of text of each batch."""
    job.out.mkdir(parents=True)
    speller = Speller(job)
    reader = Reader(job.source, job.task.fields)
    writers = {name: ShardWriter(job.out, name, dtype=np.dtype(job.dtype)) for name in SPLITS}
    for rows in batched_rows(reader, job.part):
        sides = part_rows(rows, task=job.task, share=job.held_out, seed=job.seed, cut_each=job.cut_each)
        for name, side in zip(SPLITS, sides, strict=True):
            for example in speller.examples(side):
                writers[name].write(example)
        report(sum(len(str(row.fields)) for row in rows))
    return Done({name: writer.counts() for name, writer in writers.items()}, reader.skipped)


def encode_in_process(job: Job) -> Done:
    """As one of several processes, each of which has the tokenizer to itself."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return encode_part(job)


def batched_rows(reader: Reader, part: Part) -> Iterator[list[Row]]:
    """Some rows at a time, fewer where they are long."""
    rows: list[Row] = []
    characters = 0
    for row in reader.rows(part):
        rows.append(row)
        characters += sum(len(value) for value in row.fields.values() if isinstance(value, str))
        if len(rows) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield rows
            rows, characters = [], 0
    if rows:
        yield rows


# Which side of the split a row is on


def is_held_out(name: str, *, share: float, seed: int) -> bool:
    """By a hash of the name, so that a document stays on its side when others come or go."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def part_rows(rows: list[Row], *, task: Task, share: float, seed: int, cut_each: bool) -> tuple[list[Row], list[Row]]:
    """(train, held out): whole rows, or with `cut_each` the beginning and the end of every text."""
    if not cut_each or not isinstance(task, TextTask):
        held = [is_held_out(row.name, share=share, seed=seed) for row in rows]
        train = [row for row, out in zip(rows, held, strict=True) if not out]
        return train, [row for row, out in zip(rows, held, strict=True) if out]
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        text = text_of(row, task)
        cut = int(len(text) * (1 - share))
        for side, piece in zip(sides, (text[:cut], text[cut:]), strict=True):
            side.append(Row(row.name, {task.field: piece}))
    return sides


def text_of(row: Row, task: TextTask) -> str:
    return _field(row, task.field, str)


def _field(row: Row, name: str, kind: type | tuple[type, ...]) -> Any:
    if name not in row.fields:
        fix = f"Name one of its fields in task: {', '.join(row.fields)}."
        raise Refused(f"a row has no field '{name}'", where=row.name, fix=fix)
    if not isinstance(row.fields[name], kind):
        found = type(row.fields[name]).__name__
        raise Refused(f"field '{name}' holds {found}", where=row.name, fix="Mend the row or name another field.")
    return row.fields[name]


# What a row becomes


@dataclass(frozen=True)
class Example:
    tokens: np.ndarray  # (n,)
    targets: np.ndarray | None  # (n,) int32; None: the next token, everywhere
    text_bytes: int  # of what is to be learnt


class Speller:
    """Turns rows into examples, a batch at a time: the tokenizer works on all cores."""

    def __init__(self, job: Job) -> None:
        self._task, self._end = job.task, job.end_of_text
        self._tokenizer = Tokenizer.from_file(str(job.tokenizer))
        # A document that spells the end of text does not end there; a chat's template means the marks that it spells.
        self._tokenizer.encode_special_tokens = not isinstance(job.task, ChatTask)
        self._template = ChatTemplate(job.template, bos=job.bos, eos=job.eos) if job.template is not None else None

    def examples(self, rows: list[Row]) -> Iterator[Example]:
        if isinstance(self._task, ChatTask):
            yield from self._chats(rows, self._task)
        elif isinstance(self._task, ClassifyTask):
            yield from self._classes(rows, self._task)
        elif rows:
            texts = [text_of(row, self._task) for row in rows]
            encodings = self._tokenizer.encode_batch_fast(texts)
            for text, encoding in zip(texts, encodings, strict=True):
                yield Example(np.array([*encoding.ids, self._end]), None, len(text.encode()))

    def _chats(self, rows: list[Row], task: ChatTask) -> Iterator[Example]:
        assert self._template is not None
        chats = [
            self._template.with_answers(_field(row, task.field, list), tools=row.fields.get("tools"), where=row.name)
            for row in rows
        ]
        encodings = self._tokenizer.encode_batch([text for text, _ in chats], add_special_tokens=False)
        for (text, answers), encoding in zip(chats, encodings, strict=True):
            tokens, starts = np.array(encoding.ids), np.array([start for start, _ in encoding.offsets])
            learnt = np.zeros(len(tokens), dtype=bool)
            for begin, end in answers:
                learnt |= (starts >= begin) & (starts < end)
            targets = np.full(len(tokens), NOTHING, dtype=np.int32)
            targets[:-1] = np.where(learnt[1:], tokens[1:], NOTHING)  # position i is to say token i + 1
            yield Example(tokens, targets, sum(len(text[begin:end].encode()) for begin, end in answers))

    def _classes(self, rows: list[Row], task: ClassifyTask) -> Iterator[Example]:
        encodings = self._tokenizer.encode_batch_fast([_field(row, task.text, str) for row in rows])
        for row, encoding in zip(rows, encodings, strict=True):
            tokens = np.array([*encoding.ids, self._end])
            targets = np.full(len(tokens), NOTHING, dtype=np.int32)
            targets[-1] = _class_number(_field(row, task.label, (str, int)), task.labels, row.name)
            yield Example(tokens, targets, 0)


def _class_number(label: str | int, labels: tuple[str, ...], where: str) -> int:
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    if label not in labels:
        fix = "Mend the row, or add the label to task.labels."
        raise Refused(f"label {label!r} is none of {', '.join(labels)}", where=where, fix=fix)
    return labels.index(str(label))


class ShardWriter:
    """Appends to `<split>-NNNNN.bin`, beginning a new file when one is full. Examples are never cut between two.

    Of examples the targets go to `<split>-NNNNN.targets.bin` (int32) and the ends to `….ends.bin` (int64).
    """

    def __init__(self, directory: Path, split: str, *, dtype: np.dtype) -> None:
        self._directory, self._split, self._dtype = directory, split, dtype
        self._tokens = self._learnt = self._documents = self._bytes = self._shards = self._room = 0
        self._filled = 0

    def counts(self) -> dict[str, int]:
        """`tokens`, those `learnt`, `documents`, `bytes` of text and `shards`."""
        about = {"documents": self._documents, "tokens": self._tokens, "bytes": self._bytes}
        return {**about, "learnt": self._learnt, "shards": self._shards}

    def write(self, example: Example) -> None:
        self._documents += 1
        self._bytes += example.text_bytes
        self._tokens += len(example.tokens)
        if example.targets is None:
            self._learnt += len(example.tokens)
            self._stream(example.tokens)
        elif len(example.tokens):
            self._learnt += int((example.targets != NOTHING).sum())
            self._whole(example.tokens, example.targets)

    def _stream(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if not self._room:
                self._next_shard()
            part, tokens = tokens[: self._room], tokens[self._room :]
            self._append("bin", part.astype(self._dtype))
            self._room -= len(part)

    def _whole(self, tokens: np.ndarray, targets: np.ndarray) -> None:
        if self._room < len(tokens):
            self._next_shard()
        self._append("bin", tokens.astype(self._dtype))
        self._append("targets.bin", targets.astype("<i4"))
        self._filled += len(tokens)
        self._append("ends.bin", np.array([self._filled], dtype="<i8"))
        self._room = max(self._room - len(tokens), 0)

    def _next_shard(self) -> None:
        self._shards += 1
        self._room, self._filled = SHARD_TOKENS, 0

    def _append(self, ending: str, values: np.ndarray) -> None:
        with (self._directory / f"{self._split}-{self._shards - 1:05d}.{ending}").open("ab") as file:
            file.write(values.tobytes())
