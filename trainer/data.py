"""From a corpus to token shards that are mapped into memory, and the cursor that draws every batch from them.

Run as a program it makes a dataset: `python -m trainer.data --config data.yaml out=DIR`.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.command import read_command
from trainer.config import DataConfig
from trainer.corpus import Corpus, Document, split
from trainer.errors import Refused, run_program
from trainer.files import describe_files, digest_of, fill_directory, read_json, sha256_of_file, write_json
from trainer.log import Log

END_OF_TEXT = "<|endoftext|>"
SHARD_TOKENS = 1 << 27
SPLITS = ("train", "heldout")
_FORMAT = 1
_BATCH_DOCUMENTS = 64

# Making a dataset


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2): every string has tokens and comes back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # a document that spells the end of text does not end there
    return tokenizer


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token id stands for, shape (vocabulary,); the end of text stands for none.

    In a byte-level vocabulary one character spells one byte.
    """
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == END_OF_TEXT else len(token)
    return lengths


class _ShardWriter:
    """Appends tokens to `<split>-NNNNN.bin`, beginning a new file when one is full."""

    def __init__(self, directory: Path, name: str, *, dtype: np.dtype) -> None:
        self._directory, self._name, self._dtype = directory, name, dtype
        self.tokens = self.text_bytes = self._shards = 0

    def write(self, tokens: np.ndarray, *, text_bytes: int) -> None:
        self.text_bytes += text_bytes
        while len(tokens):
            room = SHARD_TOKENS * (self._shards or 1) - self.tokens
            if not self._shards or not room:
                self._shards += 1
                room = SHARD_TOKENS
            part, tokens = tokens[:room], tokens[room:]
            with (self._directory / f"{self._name}-{self._shards - 1:05d}.bin").open("ab") as file:
                file.write(part.astype(self._dtype).tobytes())
            self.tokens += len(part)


def _encode(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens with the end of text, bytes of text) for batches of documents."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    for at in range(0, len(documents), _BATCH_DOCUMENTS):
        batch = documents[at : at + _BATCH_DOCUMENTS]
        encodings = tokenizer.encode_batch_fast([document.text for document in batch])
        ids = [np.array([*encoding.ids, end], dtype=np.uint32) for encoding in encodings]
        yield np.concatenate(ids), sum(len(document.text.encode()) for document in batch)


def make_dataset(config: DataConfig, out: Path, *, log: Log) -> None:
    """Writes the dataset of `config` in `out`, unless it is there already. Raises Refused for a corpus it cannot use."""
    begun_s = time.monotonic()
    corpus = Corpus(config.source)
    wanted = digest_of({"config": config.model_dump(mode="json"), "corpus": corpus.version, "format": _FORMAT})
    manifest = read_json(out / "manifest.json")
    skipped = manifest is not None and manifest.get("config_digest") == wanted and _sizes_fit(out, manifest)
    if not skipped:
        fill_directory(
            out, lambda directory: _write_dataset(config, corpus, directory, wanted, log), last="manifest.json"
        )
    log.emit("artifact", kind="dataset", path=str(out))
    log.emit("done", stage="data", seconds=round(time.monotonic() - begun_s, 2), skipped=skipped)


def _write_dataset(config: DataConfig, corpus: Corpus, directory: Path, config_digest: str, log: Log) -> None:
    documents = []
    for read, document in enumerate(corpus, start=1):
        documents.append(document)
        log.progress("data", done=read // 4, total=len(corpus), unit="files")
    where = getattr(config.source, "path", "the standard library")
    if sum(len(document.text) for document in documents) < 100:
        raise Refused("the corpus is empty", where=where, fix="Point source.path and source.glob at files with text.")
    train, held_out, parted = split(documents, share=config.held_out, seed=config.seed)
    tokenizer = train_tokenizer((document.text for document in train), vocab_size=config.vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size()
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")

    splits: dict[str, dict[str, Any]] = {}
    total, done = len(train) + len(held_out), 0
    for name, side in zip(SPLITS, (train, held_out), strict=True):
        writer = _ShardWriter(directory, name, dtype=dtype)
        for tokens, text_bytes in _encode(tokenizer, side):
            writer.write(tokens, text_bytes=text_bytes)
            done = min(done + _BATCH_DOCUMENTS, total)
            log.progress("data", done=total // 2 + done // 2, total=total, unit="files")
        splits[name] = {"documents": len(side), "tokens": writer.tokens, "bytes": writer.text_bytes}
    log.progress("data", done=total, total=total, unit="files")
    files = describe_files(directory)
    write_json(
        directory / "manifest.json",
        {
            "config_digest": config_digest,
            "data_digest": digest_of(files),
            "vocab_size": vocab_size,
            "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
            "end_of_text": tokenizer.token_to_id(END_OF_TEXT),
            "splits": splits,
            "parted": parted,
            "skipped_files": corpus.skipped,
            "config": config.model_dump(mode="json"),
            "files": files,
        },
    )


def _sizes_fit(directory: Path, manifest: dict[str, Any]) -> bool:
    paths = ((directory / name, entry) for name, entry in manifest["files"].items())
    return all(path.is_file() and path.stat().st_size == entry["bytes"] for path, entry in paths)


# Reading a dataset


class TokenStream:
    """The tokens of one split as one long array, mapped from its shards."""

    def __init__(self, shards: list[Path], *, dtype: np.dtype) -> None:
        self._shards = [np.memmap(path, dtype=dtype, mode="r") for path in shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) as int64, shape (length,)."""
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while length:
            begin = start - int(self._ends[shard]) + len(self._shards[shard])
            part = self._shards[shard][begin : begin + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True)
class Dataset:
    directory: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> "Dataset":
        """Raises Refused for a directory that holds no whole dataset."""
        manifest = read_json(directory / "manifest.json")
        fix = "Make it with python -m trainer.data."
        if manifest is None or "splits" not in manifest:
            raise Refused("there is no dataset", where=str(directory), fix=fix)
        for name, entry in manifest["files"].items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise Refused("the dataset is not whole: this file is absent or cut", where=str(path), fix=fix)
            if verify and sha256_of_file(path) != entry["sha256"]:
                raise Refused("the file is not the one that the manifest describes", where=str(path), fix=fix)
        return cls(directory, manifest)

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @property
    def end_of_text(self) -> int:
        return self.manifest["end_of_text"]

    @property
    def digest(self) -> str:
        return self.manifest["data_digest"]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.directory / "tokenizer.json"))

    def tokens(self, split: str) -> TokenStream:
        shards = sorted(self.directory.glob(f"{split}-*.bin"))
        return TokenStream(shards, dtype=np.dtype(self.manifest["dtype"]).newbyteorder("<"))


class Cursor:
    """Draws the batch of any step, from nothing but the step: the place in the data is exact after every resume.

    An epoch cuts the stream into windows of `seq` + 1 tokens (each shares one with the next), from an offset of its own,
    and visits every window once in an order of its own. The samples of a step are numbered before they are dealt
    to ranks, so that the global batch is the same at any world size.
    """

    def __init__(self, stream: TokenStream, *, seq: int, global_batch: int, seed: int) -> None:
        self._stream, self._seq, self._global_batch, self._seed = stream, seq, global_batch, seed
        self._windows = (len(stream) - seq) // seq  # one is lost to the offset
        if self._windows < 1:
            fix = f"Give it more text, or set seq to at most {max((len(stream) - 1) // 2, 2)}."
            raise Refused(f"{len(stream)} training tokens are too few for seq {seq}", where="seq", fix=fix)
        self._epoch = -1

    def window_starts(self, step: int) -> np.ndarray:
        """Where the samples of a step begin in the stream, shape (global_batch,)."""
        first = step * self._global_batch
        return np.array([self._start(sample) for sample in range(first, first + self._global_batch)])

    def _start(self, sample: int) -> int:
        epoch, index = divmod(sample, self._windows)
        if epoch != self._epoch:
            order = np.random.default_rng([self._seed, epoch])
            self._offset = int(order.integers(self._seq))
            self._order = order.permutation(self._windows)
            self._epoch = epoch
        return self._offset + int(self._order[index]) * self._seq

    def batch(self, step: int, *, micro: int, micro_batch: int, rank: int, world: int) -> np.ndarray:
        """Micro-batch number `micro` of a rank: tokens of shape (micro_batch, seq + 1)."""
        first = (micro * world + rank) * micro_batch
        starts = self.window_starts(step)[first : first + micro_batch]
        return np.stack([self._stream.read(int(start), self._seq + 1) for start in starts])


def main(arguments: list[str]) -> None:
    config, places = read_command("trainer.data", DataConfig, places=("out",), arguments=arguments)
    make_dataset(config, Path(places["out"]), log=Log())


if __name__ == "__main__":
    run_program(main)
