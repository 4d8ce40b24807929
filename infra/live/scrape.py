"""How a training run goes, by its own metrics, which rank 0 serves."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

from infra.apply import ApiError, Cluster
from infra.live.forward import forwarded
from infra.live.pods import state_of
from infra.live.snapshot import Snapshot

Json = dict[str, Any]
METRICS_PORT = 9400
INDEX = "batch.kubernetes.io/job-completion-index"
_GAUGE = re.compile(r"^slipway_train_(\w+) (\S+)$", re.MULTILINE)
ANSWER_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is known; None where the run does not say."""

    pod: str
    step: float | None = None
    steps: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    last_checkpoint_step: float | None = None
    goodput_ratio: float | None = None
    step_to_planned_ratio: float | None = None
    memory_to_planned_ratio: float | None = None

    def to_json(self) -> Json:
        return asdict(self)

    def __str__(self) -> str:
        """`step 320 of 1,600 · loss 3.412 · 9,970 tokens/s · checkpoint at step 200 · goodput 97 % · …`."""
        steps = f" of {self.steps:,.0f}" if self.steps else ""
        said = {
            "step {:,.0f}" + steps: self.step,
            "loss {:.3f}": self.loss,
            "{:,.0f} tokens/s": self.tokens_per_second,
            "checkpoint at step {:,.0f}"
            if self.last_checkpoint_step
            else "no checkpoint yet": self.last_checkpoint_step,
            "goodput {:.0%}": self.goodput_ratio,
            "{:.2f} × the planned time of a step": self.step_to_planned_ratio,
            "{:.2f} × the planned memory": self.memory_to_planned_ratio,
        }
        known = [form.format(value) for form, value in said.items() if value is not None]
        return " · ".join(known) or "started, and nothing is measured yet"


def training_of(cluster: Cluster, seen: Snapshot, namespace: str) -> Training | None:
    """Of the run that is under way; None where none is. By its metrics, else by the last lines of its log."""
    pod = rank_0(seen)
    if pod is None:
        return None
    import httpx  # here: every other command would start 0.1 s later

    name = pod["metadata"]["name"]
    try:
        with forwarded(cluster, namespace=namespace, pod=name, port=METRICS_PORT) as url:
            return from_metrics(httpx.get(f"{url}/metrics", timeout=ANSWER_S, trust_env=False).text, pod=name)
    except httpx.HTTPError:
        pass
    try:
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/log"
        return from_log(cluster.text(path, container="train", tailLines="50").splitlines(), pod=name)
    except ApiError:
        return Training(pod=name)


def rank_0(seen: Snapshot) -> Json | None:
    """The pod of a training Job in which rank 0 runs."""
    for pod in seen.pods:
        labels = pod["metadata"].get("labels", {})
        first = labels.get("app.kubernetes.io/component") == "train" and labels.get(INDEX, "0") == "0"
        if first and state_of(pod) in ("running", "ready"):
            return pod
    return None


def from_metrics(text: str, *, pod: str) -> Training:
    """From Prometheus' text format."""
    found = {name: float(value) for name, value in _GAUGE.findall(text)}
    return Training(pod=pod, **{name: value for name, value in found.items() if name in _FIELDS})


def from_log(lines: Iterable[str], *, pod: str) -> Training:
    """From the last `progress` event (docs/contracts.md, Log events)."""
    last: Json = {}
    for line in lines:
        try:
            event: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and cast(Json, event).items() >= {"event": "progress", "stage": "train"}.items():
            last = cast(Json, event)
    said = {"step": last.get("step"), "steps": last.get("total"), "loss": last.get("loss")}
    return Training(pod=pod, **said, tokens_per_second=last.get("tokens_per_s"))


_FIELDS = set(Training.__dataclass_fields__) - {"pod"}
