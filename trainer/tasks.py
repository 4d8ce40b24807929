"""Questions from JSONL files, multiple choice by likelihood and answers that have to match, and those of a harness."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import fsspec
import numpy as np
import torch
import torch.nn.functional as F

from trainer.config import ExactMatchTask, HarnessTask, MultipleChoiceTask
from trainer.data import Dataset
from trainer.errors import Refused
from trainer.files import digest_of
from trainer.harness import measure_with_harness, version_of_harness
from trainer.intervals import wilson
from trainer.model import Decoder
from trainer.scoring import Writer, judge_continuation
from trainer.stores import answering

_FORMS = {
    "multiple_choice": '{"question": "…", "choices": ["…", "…"], "answer": 0}',
    "exact_match": '{"question": "…", "answer": "…"}',
}
Task = MultipleChoiceTask | ExactMatchTask


def read_rows(task: Task) -> list[dict[str, Any]]:
    """At most `max_rows` questions. Raises Refused for a file that is absent or holds something else."""
    fix = f"Write lines like {_FORMS[task.kind]}."
    rows = []
    try:
        with answering(task.path, what="file of questions"), fsspec.open(task.path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):  # pyright: ignore[reportArgumentType] - opened as text
                if not line.strip():
                    continue
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
                if not _answerable(row, task):
                    raise Refused("the line is no question", where=f"{task.path}:{number}", fix=fix)
                rows.append(row)
                if len(rows) == task.max_rows:
                    break
    except FileNotFoundError:
        raise Refused(f"the questions of {task.name} are absent", where=task.path, fix="Mend tasks.path.") from None
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        raise Refused(f"the questions cannot be read: {error}", where=task.path, fix=fix) from None
    if not rows:
        raise Refused("there are no questions", where=task.path, fix=fix)
    return rows


def _answerable(row: Any, task: Task) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        return False
    if isinstance(task, ExactMatchTask):
        return isinstance(row.get("answer"), str)
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        return False
    return isinstance(answer, int) and 0 <= answer < len(choices)


def digest_of_tasks(tasks: Sequence[Task | HarnessTask]) -> str:
    """Of the questions themselves: another file under the same name is another evaluation."""
    return digest_of([version_of_harness() if isinstance(task, HarnessTask) else read_rows(task) for task in tasks])


def count_questions(task: Task | HarnessTask) -> int:
    """As far as it is known beforehand: a task of the harness counts as one."""
    return 1 if isinstance(task, HarnessTask) else len(read_rows(task))


def measure(task: Task | HarnessTask, writer: Writer, tell: Callable[[], None]) -> dict[str, Any]:
    """Accuracy with its interval; `tell` is called after each of `count_questions`."""
    if isinstance(task, HarnessTask):
        found = measure_with_harness(task, writer)
        tell()
        return found
    rows, right = read_rows(task), 0
    for row in rows:
        if isinstance(task, MultipleChoiceTask):
            right += _chosen(writer, row) == row["answer"]
        else:  # the first line of the likeliest answer
            written = writer.go_on(row["question"], max_tokens=task.max_tokens, stops=("\n",))
            right += written.strip() == row["answer"].strip()
        tell()
    return accuracy(right, len(rows))


def accuracy(right: int, count: int) -> dict[str, Any]:
    low, high = wilson(right, count)
    return {"value": right / count, "low": low, "high": high, "count": count}


def _chosen(writer: Writer, row: dict[str, Any]) -> int:
    """The choice that is likeliest a byte, so that a long one is not at a loss (as `acc_norm` of lm-evaluation-harness)."""
    prompt = writer.read(row["question"])

    def nats_a_byte(choice: str) -> float:
        ids = writer.tokenizer.encode(choice, add_special_tokens=False).ids
        return judge_continuation(writer.model, prompt, ids)[0] / len(choice.encode())

    scores = [nats_a_byte(choice) for choice in row["choices"]]
    return scores.index(min(scores))


def classification(model: Decoder, dataset: Dataset, tell: Callable[[], None]) -> tuple[dict[str, Any], float]:
    """Accuracy over the held-out texts of a classifier's dataset, and their mean cross-entropy in nats."""
    examples, right, nats = dataset.examples("heldout"), 0, 0.0
    for number, length in enumerate(examples.lengths()):
        start = max(int(length) - model.config.max_context, 0)
        tokens, targets = examples.read(number, start, int(length) - start)
        with torch.inference_mode():
            logits = model(torch.from_numpy(tokens)[None])[0, -1].float()
        right += int(logits.argmax()) == int(targets[-1])
        nats += float(F.cross_entropy(logits, torch.tensor(int(targets[-1]))))
        tell()
    return accuracy(right, len(examples)), nats / len(examples)


def answers(model: Decoder, dataset: Dataset, *, most: int, tell: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
    """-ln p of what the assistant says in each held-out chat, and how many tokens that is; each (chats,)."""
    examples, nats, counts = dataset.examples("heldout"), [], []
    for number, length in enumerate(examples.lengths()):
        tokens, targets = examples.read(number, 0, min(int(length), model.config.max_context))
        with torch.inference_mode():
            logits = model(torch.from_numpy(tokens)[None])[0].float()
        nats.append(float(F.cross_entropy(logits, torch.from_numpy(targets), reduction="sum")))
        counts.append(int((targets >= 0).sum()))
        tell()
        if sum(counts) >= most:
            break
    return np.array(nats), np.array(counts)
