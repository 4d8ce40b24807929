"""What came out of a run, from the log events of its programs: loss curve, evaluation, a streamed completion, what to try next."""

import json
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

BASELINES = {"unigram": "unigram", "trigram": "trigram, interpolated", "kneser_ney_5": "5-gram, Kneser–Ney"}
ANSWER_S = 60.0
CURVE_WIDTH, CURVE_HEIGHT = 76, 14


@dataclass
class Outcome:
    """The last of each event that a summary shows."""

    curve: dict[int, float] = field(default_factory=dict[int, float])
    """Training loss by step."""
    evaluation: dict[str, Any] = field(default_factory=dict[str, Any])
    published: dict[str, Any] = field(default_factory=dict[str, Any])
    artifacts: dict[str, str] = field(default_factory=dict[str, str])
    """Path by kind."""

    def see(self, event: Mapping[str, Any]) -> None:
        match event.get("event"):
            case "progress" if event.get("stage") == "train" and event.get("loss") is not None:
                self.curve[int(event["step"])] = float(event["loss"])
            case "evaluation":
                self.evaluation = dict(event)
            case "published":
                self.published = dict(event)
            case "artifact":
                self.artifacts[str(event["kind"])] = str(event["path"])
            case _:
                pass


def outcome_of(lines: Iterable[str]) -> Outcome:
    """The outcome that log lines tell of; what is no event is passed over."""
    outcome = Outcome()
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            outcome.see(cast(dict[str, Any], event))
    return outcome


def show_curve(outcome: Outcome, *, console: Console) -> None:
    """Training loss by step, in characters, and where the picture is."""
    if len(outcome.curve) < 2:
        return
    import plotext  # pyright: ignore[reportMissingTypeStubs]  # here: every other command would start 0.2 s later

    points = _smooth(outcome.curve, bins=2 * CURVE_WIDTH)
    last = max(outcome.curve)
    ticks = [last * part // 4 for part in range(1, 5)]
    figure = cast(Any, plotext).figure
    figure.clear()
    figure.plot_size(min(console.width, CURVE_WIDTH), CURVE_HEIGHT)
    figure.title("training loss (nats per token) by step")
    figure.ruler("x").ticks(ticks, [f"{tick:,}" for tick in ticks])
    figure.draw(figure.signal([step for step, _ in points], [loss for _, loss in points], marker="braille"))
    console.print(Text(figure.build().string(colorless=True).rstrip(), style="cyan"))
    if "plot" in outcome.artifacts:
        console.print(Text(f"picture: {outcome.artifacts['plot']}", style="dim"))


def _smooth(curve: Mapping[int, float], *, bins: int) -> list[tuple[float, float]]:
    """Mean step and mean loss of at most `bins` runs of steps: as many points as a terminal has room for."""
    steps = sorted(curve)
    each = -(-len(steps) // bins)
    runs = [steps[at : at + each] for at in range(0, len(steps), each)]
    return [(sum(run) / len(run), sum(curve[step] for step in run) / len(run)) for run in runs]


def show_evaluation(outcome: Outcome, *, console: Console) -> None:
    """Bits per byte of the model and of the n-gram models on text that neither has seen; what it gets right."""
    found = outcome.evaluation
    if not found:
        return
    if found["bits_per_byte"] is not None:
        console.print(_bits(found))
    if found.get("accuracy"):
        console.print(_accuracy(found["accuracy"]))


def _bits(found: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("held-out text")
    table.add_column("bits per byte", justify="right")
    rows = [(BASELINES.get(name, name), value) for name, value in found["baselines"].items()]
    for name, value in sorted([*rows, ("the model", found["bits_per_byte"])], key=lambda row: -row[1]):
        table.add_row(name, f"{value:.3f}", style="bold green" if name == "the model" else "")
    return table


def _accuracy(by_task: Mapping[str, Any]) -> Table:
    """A classifier's share of held-out texts that it gets right, and that of each set of questions."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("held-out questions", "right", "95 % interval", "of"):
        table.add_column(name, justify="left" if name == "held-out questions" else "right")
    for name, share in by_task.items():
        what = "texts to classify" if name == "classification" else name
        interval = f"{share['low']:.1%} to {share['high']:.1%}"
        table.add_row(what, Text(f"{share['value']:.1%}", style="bold green"), interval, f"{share['count']:,}")
    return table


def wait_for_answer(url: str) -> None:
    """Until the router passes requests on: it probes replicas itself, and may see one a moment after it is ready.

    Raises ConnectionError with the last answer when it still has none after ANSWER_S.
    """
    import httpx

    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            response = httpx.get(f"{url}/v1/models", timeout=ANSWER_S)
            if response.status_code != 503:
                return
            problem = f"503, {response.text.strip()}"
        except httpx.HTTPError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise ConnectionError(problem)
        time.sleep(0.2)


def stream_completion(url: str, *, model: str, prompt: str, max_tokens: int, key: str | None, console: Console) -> None:
    """Ask the endpoint and show the answer as it comes. Raises ConnectionError when it does not answer."""
    import httpx  # here: every other command would start 0.1 s later

    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.6, "seed": 1, "stream": True}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    console.print(Text(prompt, style="dim"), end="")
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=ANSWER_S) as response:
            if response.status_code != 200:
                response.read()
                response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        console.print(Text(choice["text"], style="cyan"), end="")
    except httpx.HTTPError as error:
        raise ConnectionError(str(error)) from None
    console.print()


def curl(url: str, *, model: str, prompt: str, key: str | None) -> str:
    """A command that asks the endpoint, for people to copy; `key` is the variable with an API key."""
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 64})
    header = f'-H "authorization: Bearer ${key}" ' if key else ""
    return f"curl -s {url}/v1/completions {header}-H 'content-type: application/json' -d {shlex.quote(body)}"
