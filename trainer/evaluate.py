"""How well a model says what comes next in text that no training saw, beside n-gram models of the same tokens.

`python -m trainer.evaluate --config evaluate.yaml model=DIR data=DIR out=DIR [base=DIR]`; adapters are measured with the
`base` that they are for. The measure is bits per byte: the
cross-entropy of the held-out text, divided by its bytes, so that models with other tokenizers compare.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from trainer.command import read_command
from trainer.config import EvaluateConfig
from trainer.data import Dataset, bytes_of_tokens
from trainer.errors import Refused, run_program
from trainer.files import digest_of, read_json, sha256_of_file, write_json, write_whole
from trainer.intervals import ratio_of_sums
from trainer.log import Log
from trainer.model import Decoder
from trainer.ngram import baselines
from trainer.package import load_package
from trainer.scoring import Writer, token_nats
from trainer.shapes import weights_digest
from trainer.tasks import answers, classification, count_questions, digest_of_tasks, measure


def evaluate(config: EvaluateConfig, *, model: Path, data: Path, out: Path, log: Log, base: Path | None = None) -> None:
    """Writes `evaluation.json` and `evaluation.md`, unless they are there already for this model, data and config."""
    begun_s = time.monotonic()
    dataset = Dataset.open(data)
    decoder = load_package(model, base=base)
    inputs = {"config": config.digest(), "data": dataset.digest, "model": weights_digest(model)}
    if config.tasks:
        inputs["questions"] = digest_of_tasks(config.tasks)
    report = read_json(out / "evaluation.json")
    skipped = (
        report is not None and report.get("inputs_digest") == digest_of(inputs) and (out / "evaluation.md").exists()
    )
    if report is None or not skipped:
        _same_tokenizer(model, data)
        report = {"inputs_digest": digest_of(inputs), "model_digest": inputs["model"], "data_digest": dataset.digest}
        report |= _measure(config, decoder, dataset, log=log)
        write_whole(out / "evaluation.md", as_markdown(report))
        write_json(out / "evaluation.json", report)
    fields = ("bits_per_byte", "baselines", "loss", "tokens", "sample", "accuracy", "intervals")
    log.emit("evaluation", **{name: report[name] for name in fields})
    log.emit("artifact", kind="report", path=str(out / "evaluation.md"))
    log.emit("done", stage="evaluate", seconds=round(time.monotonic() - begun_s, 2), skipped=skipped)


def _same_tokenizer(model: Path, data: Path) -> None:
    ours, theirs = (directory / "tokenizer.json" for directory in (model, data))
    if not ours.is_file():
        fix = "Put the one there that belongs to the weights."
        raise Refused("the model package has no tokenizer", where=str(ours), fix=fix)
    if sha256_of_file(ours) != sha256_of_file(theirs):
        fix = "Evaluate it on the dataset that it was trained on."
        raise Refused("the model and the dataset have different tokenizers", where=str(ours), fix=fix)


def _measure(config: EvaluateConfig, decoder: Decoder, dataset: Dataset, *, log: Log) -> dict[str, Any]:
    """By the dataset's task, then the tasks of the config; `baselines` and `accuracy` are always there."""
    progress = _Progress(log, config, dataset)
    measures = {"text": _measure_text, "chat": _measure_chats, "classify": _measure_classes}
    report = {"task": dataset.task, "baselines": {}, "accuracy": {}, "intervals": {}, "sample": ""}
    report |= measures[dataset.task](config, decoder, dataset, progress)
    if config.tasks and dataset.task == "classify":
        fix = "Remove tasks from evaluate.yaml."
        raise Refused("a classifier writes no answers", where="tasks", fix=fix)
    if dataset.task != "classify":
        writer = Writer(decoder, dataset)
        for task in config.tasks:
            report["accuracy"][task.name] = measure(task, writer, progress.tell)
        report["sample"] = writer.complete(config.sample.prompt, max_tokens=config.sample.max_tokens)
    progress.end()
    return report


class _Progress:
    """A bar over things that are not alike: tokens of text, and then questions, chats or texts."""

    def __init__(self, log: Log, config: EvaluateConfig, dataset: Dataset) -> None:
        self.log, self._done = log, 0
        questions = sum(count_questions(task) for task in config.tasks)
        self._total = questions + (len(dataset.examples("heldout")) if dataset.task != "text" else 0)

    def tell(self) -> None:
        self._done += 1
        self.log.progress("evaluate", done=min(self._done, self._total - 1), total=self._total, unit="questions")

    def end(self) -> None:
        if self._total:
            self.log.progress("evaluate", done=self._total, total=self._total, unit="questions")


def _measure_text(config: EvaluateConfig, decoder: Decoder, dataset: Dataset, progress: _Progress) -> dict[str, Any]:
    held_out, train = dataset.tokens("heldout"), dataset.tokens("train")
    tokens = held_out.read(0, min(config.max_tokens + 1, len(held_out)))
    if len(tokens) < 2:
        fix = "Give the corpus more text or raise held_out in data.yaml."
        raise Refused(f"the held-out text has {len(tokens)} tokens", where=str(dataset.directory), fix=fix)
    bytes_of = bytes_of_tokens(dataset.tokenizer())[tokens[1:]]
    text_bytes = int(bytes_of.sum())
    nats = token_nats(decoder, tokens, log=progress.log)
    scores: dict[str, float] = {}
    counted = train.read(0, len(train))
    for name, probability in baselines(counted, vocab_size=dataset.vocab_size, names=config.baselines):
        scores[name] = float(-np.log2(probability(tokens)[1:]).sum() / text_bytes)
        share = len(nats) + len(nats) * len(scores) // (len(config.baselines) + 1)
        progress.log.progress("evaluate", done=share, total=2 * len(nats), unit="tokens")
    progress.log.progress("evaluate", done=2 * len(nats), total=2 * len(nats), unit="tokens")
    return {
        "bits_per_byte": float(nats.sum() / math.log(2) / text_bytes),
        "baselines": scores,
        "intervals": {"bits_per_byte": ratio_of_sums(nats / math.log(2), bytes_of)},
        "loss": float(nats.mean()),
        "tokens": len(nats),
        "bytes": text_bytes,
    }


def _measure_chats(config: EvaluateConfig, decoder: Decoder, dataset: Dataset, progress: _Progress) -> dict[str, Any]:
    """Bits for each byte of what the assistant says, its bytes as the dataset has them on average for a token."""
    nats, counts = answers(decoder, dataset, most=config.max_tokens, tell=progress.tell)
    held_out = dataset.manifest.splits["heldout"]
    if not counts.sum():
        fix = "Hold out more chats, or train with a longer max_context."
        raise Refused("no held-out answer is within the model's context", where=str(dataset.directory), fix=fix)
    bytes_a_token = held_out.bytes / held_out.learnt
    bits, of = nats / math.log(2), counts * bytes_a_token
    return {
        "bits_per_byte": float(bits.sum() / of.sum()),
        "intervals": {"bits_per_byte": ratio_of_sums(bits, of)},
        "loss": float(nats.sum() / counts.sum()),
        "tokens": int(counts.sum()),
        "bytes": int(of.sum()),
    }


def _measure_classes(
    _config: EvaluateConfig, decoder: Decoder, dataset: Dataset, progress: _Progress
) -> dict[str, Any]:
    right, loss = classification(decoder, dataset, progress.tell)
    return {"bits_per_byte": None, "accuracy": {"classification": right}, "loss": loss, "tokens": right["count"]}


def as_markdown(report: dict[str, Any]) -> str:
    """The report for people: the model among its baselines, best first, what it gets right, and what it writes."""
    parts = ["# Evaluation\n"]
    if report["bits_per_byte"] is not None:
        low, high = report["intervals"]["bits_per_byte"]
        rows = [("**the model**", report["bits_per_byte"]), *report["baselines"].items()]
        table = "\n".join(f"| {name} | {value:.3f} |" for name, value in sorted(rows, key=lambda row: row[1]))
        what = "held-out tokens" if report["task"] == "text" else "held-out tokens of answers"
        parts.append(
            f"Bits per byte on {report['tokens']:,} {what} ({report['bytes']:,} bytes of text); less is better. "
            "Every row saw the same training text through the same tokenizer. The model's 95 % interval is "
            f"{low:.3f} to {high:.3f}.\n\n| | bits per byte |\n| --- | ---: |\n{table}\n"
        )
    if report["accuracy"]:
        rows = [
            f"| {name} | {found['value']:.1%} | {found['low']:.1%} to {found['high']:.1%} | {found['count']:,} |"
            for name, found in report["accuracy"].items()
        ]
        head = "| | accuracy | 95 % interval | questions |\n| --- | ---: | ---: | ---: |\n"
        parts.append(head + "\n".join(rows) + "\n")
    unit = "text" if report["task"] == "classify" else "token"
    parts.append(f"Cross-entropy of the model: {report['loss']:.4f} nats a {unit}.\n")
    if report["sample"]:
        fence = "`" * 4
        parts.append(f"## Sample\n\nThe prompt and its likeliest completion:\n\n{fence}\n{report['sample']}\n{fence}\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> None:
    places = ("model", "data", "out")
    config, given = read_command(
        "trainer.evaluate", EvaluateConfig, places=places, optional=("base",), arguments=arguments
    )
    evaluate(config, **{name: Path(place) for name, place in given.items()}, log=Log())


if __name__ == "__main__":
    run_program(main)
