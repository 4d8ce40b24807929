"""How well a model says what comes next in text that no training saw, beside n-gram models of the same tokens.

`python -m trainer.evaluate --config evaluate.yaml model=DIR data=DIR out=DIR`. The measure is bits per byte: the
cross-entropy of the held-out text, divided by its bytes, so that models with other tokenizers compare.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from trainer.command import read_command
from trainer.config import EvaluateConfig, SampleConfig
from trainer.data import END_OF_TEXT, Dataset, bytes_of_tokens
from trainer.errors import Refused, run_program
from trainer.files import digest_of, read_json, sha256_of_file, write_json, write_whole
from trainer.log import Log
from trainer.model import Decoder
from trainer.ngram import baselines
from trainer.package import load_package

_BATCH_TOKENS = 8192


@torch.inference_mode()
def token_nats(model: Decoder, tokens: np.ndarray, *, log: Log | None = None) -> np.ndarray:
    """-ln p of tokens 1 … n-1, each given what came before it; from tokens (n,) to nats (n - 1,).

    Windows of the whole context overlap by half, and a token counts where it has the more context: never less than half
    of the window, except at the very beginning.
    """
    window = min(model.config.max_context, len(tokens) - 1)
    stride = max(window // 2, 1)
    starts = [*range(0, len(tokens) - 1 - window, stride), len(tokens) - 1 - window]
    nats = np.empty(len(tokens) - 1)
    batch, scored = max(_BATCH_TOKENS // window, 1), 0
    for at in range(0, len(starts), batch):
        some = starts[at : at + batch]
        x_BL = torch.from_numpy(np.stack([tokens[start : start + window + 1] for start in some]))
        logits_BLV = model(x_BL[:, :-1])
        found_BL = F.cross_entropy(logits_BLV.transpose(1, 2).float(), x_BL[:, 1:], reduction="none").numpy()
        for start, found_L in zip(some, found_BL, strict=True):
            nats[scored : start + window] = found_L[scored - start :]
            scored = start + window
        if log is not None:
            log.progress("evaluate", done=scored, total=2 * len(nats), unit="tokens")
    return nats


@torch.inference_mode()
def complete(model: Decoder, tokenizer: Tokenizer, config: SampleConfig) -> str:
    """The likeliest completion of the prompt, with the prompt; it ends at the end of text or after `max_tokens`."""
    ids = tokenizer.encode(config.prompt).ids
    if not ids:
        return ""
    for _ in range(config.max_tokens):
        context = torch.tensor([ids[-model.config.max_context :]])
        ids.append(int(model(context)[0, -1].argmax()))
        if tokenizer.id_to_token(ids[-1]) == END_OF_TEXT:
            ids.pop()
            break
    return tokenizer.decode(ids)


def evaluate(config: EvaluateConfig, *, model: Path, data: Path, out: Path, log: Log) -> None:
    """Writes `evaluation.json` and `evaluation.md`, unless they are there already for this model, data and config."""
    begun_s = time.monotonic()
    dataset = Dataset.open(data)
    decoder = load_package(model)
    inputs = {"config": config.digest(), "data": dataset.digest, "model": sha256_of_file(model / "model.safetensors")}
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
    fields = ("bits_per_byte", "baselines", "loss", "tokens", "sample")
    log.emit("evaluation", **{name: report[name] for name in fields})
    log.emit("artifact", kind="report", path=str(out / "evaluation.md"))
    log.emit("done", stage="evaluate", seconds=round(time.monotonic() - begun_s, 2), skipped=skipped)


def _same_tokenizer(model: Path, data: Path) -> None:
    ours, theirs = (directory / "tokenizer.json" for directory in (model, data))
    if not ours.is_file() or sha256_of_file(ours) != sha256_of_file(theirs):
        fix = "Evaluate it on the dataset that it was trained on."
        raise Refused("the model and the dataset have different tokenizers", where=str(ours), fix=fix)


def _measure(config: EvaluateConfig, decoder: Decoder, dataset: Dataset, *, log: Log) -> dict[str, Any]:
    held_out, train = dataset.tokens("heldout"), dataset.tokens("train")
    tokens = held_out.read(0, min(config.max_tokens + 1, len(held_out)))
    if len(tokens) < 2:
        fix = "Give the corpus more text or raise held_out in data.yaml."
        raise Refused(f"the held-out text has {len(tokens)} tokens", where=str(dataset.directory), fix=fix)
    text_bytes = int(bytes_of_tokens(dataset.tokenizer())[tokens[1:]].sum())
    nats = token_nats(decoder, tokens, log=log)
    scores: dict[str, float] = {}
    counted = train.read(0, len(train))
    for name, probability in baselines(counted, vocab_size=dataset.vocab_size, names=config.baselines):
        scores[name] = float(-np.log2(probability(tokens)[1:]).sum() / text_bytes)
        share = len(nats) + len(nats) * len(scores) // (len(config.baselines) + 1)
        log.progress("evaluate", done=share, total=2 * len(nats), unit="tokens")
    sample = complete(decoder, dataset.tokenizer(), config.sample)
    log.progress("evaluate", done=2 * len(nats), total=2 * len(nats), unit="tokens")
    return {
        "bits_per_byte": float(nats.sum() / math.log(2) / text_bytes),
        "baselines": scores,
        "loss": float(nats.mean()),
        "tokens": len(nats),
        "bytes": text_bytes,
        "sample": sample,
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report for people: the model among its baselines, best first, and what it writes."""
    rows = [("**the model**", report["bits_per_byte"]), *report["baselines"].items()]
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in sorted(rows, key=lambda row: row[1]))
    fence = "`" * 4
    return (
        "# Evaluation\n\n"
        f"Bits per byte on {report['tokens']:,} held-out tokens ({report['bytes']:,} bytes of text); less is better. "
        "Every row saw the same training text through the same tokenizer.\n\n"
        f"| | bits per byte |\n| --- | ---: |\n{table}\n\n"
        f"Cross-entropy of the model: {report['loss']:.4f} nats a token.\n\n"
        f"## Sample\n\nThe prompt and its likeliest completion:\n\n{fence}\n{report['sample']}\n{fence}\n"
    )


def main(arguments: list[str]) -> None:
    places = ("model", "data", "out")
    config, given = read_command("trainer.evaluate", EvaluateConfig, places=places, arguments=arguments)
    paths = {name: Path(given[name]) for name in places}
    evaluate(config, model=paths["model"], data=paths["data"], out=paths["out"], log=Log())


if __name__ == "__main__":
    run_program(main)
