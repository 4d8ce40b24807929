"""From a corpus to a dataset: a tokenizer, then every part of every source into shards, by all cores.

The parts are encoded apart and numbered in order: the same corpus gives the same bytes on any machine.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from trainer.data.chat import check_chat
from trainer.data.config import ChatTask, ClassifyTask, DataConfig
from trainer.data.dataset import Dataset
from trainer.data.encode import SPLITS, Done, Job, batched_rows, encode_in_process, encode_part, is_held_out, part_rows
from trainer.data.sources import Part, Reader, Row
from trainer.data.tokenizer import TURN_MARKS, Vocabulary, trained_vocabulary, vocabulary_of
from trainer.errors import Refused
from trainer.files import describe_files, digest_of, fill_directory, sha256_of_file, write_json
from trainer.log import Log

TOKENIZER_BYTES = 256 << 20  # of text are enough to find the commonest pairs of a language
_FORMAT = 2
_ALONE_BYTES = 32 << 20  # is tokenised before another process has started


def make_dataset(config: DataConfig, out: Path, *, log: Log, base: Path | None = None) -> None:
    """Writes the dataset of `config` in `out`, unless it is there already, with the tokenizer of the package `base` if any.

    Raises Refused for a corpus that it cannot use.
    """
    begun_s = time.monotonic()
    readers = [Reader(part.source, config.task.fields) for part in config.parts]
    wanted = {"config": config.model_dump(mode="json"), "corpus": [r.version for r in readers], "format": _FORMAT}
    if base is not None:
        wanted["tokenizer"] = sha256_of_file(base / "tokenizer.json") if (base / "tokenizer.json").is_file() else None
    skipped = _is_made(out, digest_of(wanted))
    if not skipped:
        making = _Making(config, readers, base, log)
        fill_directory(out, lambda directory: making.write(directory, digest_of(wanted)), last="manifest.json")
    log.emit("artifact", kind="dataset", path=str(out))
    log.emit("done", stage="data", seconds=round(time.monotonic() - begun_s, 2), skipped=skipped)


def _is_made(directory: Path, config_digest: str) -> bool:
    """Whether the whole dataset of that config is there."""
    try:
        return Dataset.open(directory, verify=False).manifest.config_digest == config_digest
    except Refused:
        return False


class _Making:
    """One dataset under way."""

    def __init__(self, config: DataConfig, readers: list[Reader], base: Path | None, log: Log) -> None:
        self._config, self._readers, self._base, self._log = config, readers, base, log
        self._parts: list[list[Part]] = [reader.parts() for reader in readers]
        self._bytes = sum(part.size_bytes for parts in self._parts for part in parts)
        self._done_bytes = 0
        self._cut_each = [self._one_side_is_empty(number) for number in range(len(readers))]

    def write(self, directory: Path, config_digest: str) -> None:
        vocabulary = self._vocabulary()
        vocabulary.tokenizer.save(str(directory / "tokenizer.json"))
        for name, content in vocabulary.files.items():
            (directory / name).write_bytes(content)
        if vocabulary.chat_template is not None:
            (directory / "chat_template.jinja").write_text(vocabulary.chat_template, encoding="utf-8")
        dtype = "<u2" if vocabulary.size <= 1 << 16 else "<u4"
        jobs = [self._jobs(number, vocabulary, directory, dtype) for number in range(len(self._parts))]
        done = self._encode([job for source in jobs for job in source])
        sources = self._collect(directory, jobs, done)
        _check_splits(sources, self._readers)
        self._log.progress("data", done=2 * self._bytes, total=2 * self._bytes, unit="bytes")
        files = describe_files(directory)
        task = self._config.task
        manifest = {
            "config_digest": config_digest,
            "data_digest": digest_of({"files": files, "weights": [source["weight"] for source in sources]}),
            "vocab_size": vocabulary.size,
            "dtype": "uint16" if dtype == "<u2" else "uint32",
            "end_of_text": vocabulary.end_of_text,
            "end_of_turn": vocabulary.tokenizer.token_to_id(TURN_MARKS[1]) if self._base is None else None,
            "task": task.kind,
            "labels": list(task.labels) if isinstance(task, ClassifyTask) else None,
            "splits": {name: _total(sources, name) for name in SPLITS},
            "sources": sources,
            "parted": "by the end of each document" if any(self._cut_each) else "by document",
            "skipped_files": sum(each.skipped for each in done),
            "config": self._config.model_dump(mode="json"),
            "files": files,
        }
        write_json(directory / "manifest.json", manifest)

    # The tokenizer

    def _vocabulary(self) -> Vocabulary:
        chat = isinstance(self._config.task, ChatTask)
        if self._base is None:
            return trained_vocabulary(self._texts(), vocab_size=self._config.vocab_size, chat=chat)
        vocabulary = vocabulary_of(self._base)
        if "vocab_size" in self._config.model_fields_set and self._config.vocab_size != vocabulary.size:
            what = f"vocab_size {self._config.vocab_size} is not the package's {vocabulary.size}"
            raise Refused(what, where=str(self._base), fix="Leave vocab_size out: it comes with the package.")
        if chat and vocabulary.chat_template is None:
            fix = "Put a chat_template.jinja beside it."
            raise Refused("the package has no chat template", where=str(self._base), fix=fix)
        return vocabulary

    def _texts(self) -> Iterator[str]:
        """The training text, or of a large corpus an even sample of TOKENIZER_BYTES. Refuses one without text."""
        share, characters = min(TOKENIZER_BYTES / max(self._bytes, 1), 1.0), 0
        for number, reader in enumerate(self._readers):
            for part in self._parts[number]:
                for rows in batched_rows(reader, part):
                    for text in self._training_texts(rows, cut_each=self._cut_each[number]):
                        if share == 1.0 or is_held_out(text[:256], share=share, seed=self._config.seed):
                            characters += len(text)
                            yield text
                    self._tell(rows)
        if characters < 100:
            fix = "Point source.path and source.glob at files with text."
            raise Refused("the corpus is empty", where=self._readers[0].where, fix=fix)

    def _training_texts(self, rows: list[Row], *, cut_each: bool) -> Iterator[str]:
        task, config = self._config.task, self._config
        train, _ = part_rows(rows, task=task, share=config.held_out, seed=config.seed, cut_each=cut_each)
        for row in train:
            if isinstance(task, ChatTask):
                messages = row.fields.get(task.field)
                check_chat(messages, where=row.name)
                yield "\n".join(message["content"] or "" for message in messages or [])
            else:
                yield str(row.fields.get(task.fields[0]) or "")

    # The split

    def _one_side_is_empty(self, source: int) -> bool:
        """Whether the documents of a text source all fall on one side, so that each has to give its end."""
        config, sides = self._config, set()
        if config.task.kind != "text":
            return False
        for part in self._parts[source]:
            for row in self._readers[source].rows(part):
                sides.add(is_held_out(row.name, share=config.held_out, seed=config.seed))
                if len(sides) == 2:
                    return False
        return True

    # The parts

    def _jobs(self, source: int, vocabulary: Vocabulary, directory: Path, dtype: str) -> list[Job]:
        config = self._config
        return [
            Job(
                source=config.parts[source].source,
                part=part,
                task=config.task,
                held_out=config.held_out,
                seed=config.seed,
                cut_each=self._cut_each[source],
                tokenizer=directory / "tokenizer.json",
                end_of_text=vocabulary.end_of_text,
                template=vocabulary.chat_template if isinstance(config.task, ChatTask) else None,
                bos=vocabulary.bos,
                eos=vocabulary.eos,
                dtype=dtype,
                out=directory / f"part-{source}-{number}",
            )
            for number, part in enumerate(self._parts[source])
        ]

    def _encode(self, jobs: list[Job]) -> list[Done]:
        """A process a core; for a little text this one alone, whose batches the tokenizer spreads over the cores."""
        self._done_bytes = self._bytes
        workers = min(len(jobs), os.cpu_count() or 1)
        if workers == 1 or self._bytes < _ALONE_BYTES:
            return [encode_part(job, self._advance) for job in jobs]
        done = []
        context = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's threads as they stand
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for job, result in zip(jobs, pool.map(encode_in_process, jobs), strict=True):
                done.append(result)
                self._advance(job.part.size_bytes)
        return done

    def _tell(self, rows: list[Row]) -> None:
        self._advance(sum(len(str(row.fields)) for row in rows))

    def _advance(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        total = 2 * self._bytes
        self._log.progress("data", done=min(self._done_bytes, max(total - 1, 0)), total=total, unit="bytes")

    def _collect(self, directory: Path, jobs: list[list[Job]], done: list[Done]) -> list[dict[str, Any]]:
        """Renames the shards of all parts to one series, and says which belong to which source."""
        results, series = iter(done), dict.fromkeys(SPLITS, 0)
        sources = []
        for part, source_jobs in zip(self._config.parts, jobs, strict=True):
            splits: dict[str, dict[str, Any]] = {name: {"shards": []} for name in SPLITS}
            for job in source_jobs:
                counts = next(results).splits
                for name in SPLITS:
                    for number in range(counts[name].pop("shards")):
                        shard = f"{name}-{series[name]:05d}"
                        for path in sorted(job.out.glob(f"{name}-{number:05d}.*")):
                            path.rename(directory / path.name.replace(f"{name}-{number:05d}", shard))
                        splits[name]["shards"].append(shard)
                        series[name] += 1
                    for what, count in counts[name].items():
                        splits[name][what] = splits[name].get(what, 0) + count
                job.out.rmdir()
            sources.append({"name": part.name, "weight": part.weight, "splits": splits})
        return sources


def _total(sources: list[dict[str, Any]], split: str) -> dict[str, int]:
    counted = [source["splits"][split] for source in sources]
    return {what: sum(each[what] for each in counted) for what in ("documents", "tokens", "bytes", "learnt")}


def _check_splits(sources: list[dict[str, Any]], readers: list[Reader]) -> None:
    for source, reader in zip(sources, readers, strict=True):
        if not source["splits"]["train"].get("learnt"):
            fix = "Add rows, or mend what the task names."
            raise Refused("the source has nothing to learn", where=reader.where, fix=fix)
    if not _total(sources, "heldout")["learnt"]:
        fix = "Add rows, or raise held_out."
        raise Refused("no row is held out to evaluate on", where=readers[0].where, fix=fix)
