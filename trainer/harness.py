"""Tasks of lm-evaluation-harness (Gao et al. 2021), where that library is installed: it asks, the model answers."""

import logging
from importlib import metadata
from typing import Any

from trainer.config import HarnessTask
from trainer.errors import Refused
from trainer.intervals import wilson
from trainer.scoring import Writer, judge_continuation


def version_of_harness() -> str:
    """Raises Refused where it is not installed."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        fix = "Install it: pip install lm_eval, or remove the task."
        raise Refused("the task is lm-evaluation-harness's, which is not installed", where="tasks", fix=fix) from None


def measure_with_harness(task: HarnessTask, writer: Writer) -> dict[str, Any]:
    """The share that the task's metric says, with its interval. Raises Refused for a task or metric that is not there."""
    version_of_harness()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    ask: Any = simple_evaluate  # whose decorator hides its parameters
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        found: Any = ask(
            _as_model(writer),
            tasks=[task.task],
            task_manager=TaskManager(include_path=task.path, include_defaults=task.path is None),
            num_fewshot=task.few_shot,
            limit=task.max_rows,
            bootstrap_iters=0,
            log_samples=False,
        )
    except Refused:
        raise
    except Exception as error:  # it fetches data and imports what a task names: anything can be amiss there
        fix = "See whether lm_eval runs the task by itself; its data has to be at hand, or the network."
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refused(f"lm-evaluation-harness cannot run {task.task}: {what}", where=task.name, fix=fix) from None
    rows, counts = found["results"][task.task], found["n-samples"]
    values = {key.partition(",")[0]: value for key, value in rows.items() if isinstance(value, float)}
    value = values.get(task.metric)
    if value is None or not 0 <= value <= 1:
        shares = ", ".join(name for name, each in values.items() if 0 <= each <= 1 and not name.endswith("_stderr"))
        fix = f"Set metric to one of: {shares or 'none, this task has no share of right answers'}."
        raise Refused(f"{task.task} has no share of right answers '{task.metric}'", where=task.name, fix=fix)
    count = sum(each["effective"] for each in counts.values())
    low, high = wilson(round(value * count), count)
    return {"value": value, "low": low, "high": high, "count": count}


def _as_model(writer: Writer) -> Any:
    """The model as the harness speaks to one; its base class is the library's, which may be absent."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Asked(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return writer.end_of_text

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_more: Any) -> list[int]:
            return writer.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)).ids

        def _loglikelihood_tokens(self, requests: list[Any], **_more: Any) -> list[tuple[float, bool]]:
            judged = (judge_continuation(writer.model, prompt, continuation) for _, prompt, continuation in requests)
            return [(-nats, likeliest) for nats, likeliest in judged]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
            return [self._whole_text(request.args[0]) for request in requests]

        def _whole_text(self, text: str) -> float:
            """By the harness's own windows, which share nothing but a token."""
            size = {"max_seq_len": writer.model.config.max_context, "context_len": 1}
            windows = get_rolling_token_windows(self.tok_encode(text), prefix_token=self.eot_token_id, **size)
            return -sum(judge_continuation(writer.model, *make_disjoint_window(window))[0] for window in windows)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
            return [self._answer(*request.args) for request in requests]

        def _answer(self, prompt: str, wishes: dict[str, Any]) -> str:
            if wishes.get("do_sample") or wishes.get("temperature"):
                fix = "Take a variant of the task that asks for the likeliest answer."
                raise Refused("the task draws answers at random", where="tasks", fix=fix)
            stops = wishes.get("until") or []
            stops = tuple([stops] if isinstance(stops, str) else stops)
            return writer.go_on(prompt, max_tokens=wishes.get("max_gen_toks", 256), stops=stops)

    return Asked()
