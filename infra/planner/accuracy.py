"""Published measurements against the planner: each quantity of each point, predicted from the point's other fields."""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import isfinite
from statistics import median
from typing import Any, cast, get_args

from infra.planner import point_runs, points
from infra.planner.collectives import Collective, Group, collective_s
from infra.planner.estimate import GIB
from infra.planner.frameworks import Framework
from infra.planner.points import Point, Raw, read_point
from infra.planner.run import Run
from infra.planner.serve_memory import cache, weight_bytes
from infra.planner.serve_time import Server
from infra.planner.train_memory import CONTEXT_GIB, memory
from infra.planner.train_time import hardware_flops_share, step_time, tokens_per_s_per_gpu


@dataclass(frozen=True)
class Row:
    """One quantity of one point."""

    id: str
    category: str
    quantity: str
    measured: float | bool
    predicted: float | bool
    rel_error: float
    """(predicted − measured) / measured; for oom and fits 0 when right and 1 when wrong."""


@dataclass(frozen=True)
class NotEstimated:
    id: str
    why: str


@dataclass(frozen=True)
class Accuracy:
    points: tuple[Row, ...]
    not_estimated: tuple[NotEstimated, ...]
    assumptions: dict[str, tuple[str, ...]]
    """What was taken for granted where a point does not say, by its id."""

    @property
    def categories(self) -> dict[str, dict[str, float]]:
        """By kind of quantity: how many, median and 90th percentile of |error|."""
        kinds: dict[str, list[float]] = {}
        for row in self.points:
            kinds.setdefault(kind_of(row), []).append(abs(row.rel_error))
        return {
            kind: {"count": len(errors), "median": median(errors), "p90": percentile(errors, 0.9)}
            for kind, errors in sorted(kinds.items())
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "points": [asdict(row) for row in self.points],
            "categories": self.categories,
            "not_estimated": [asdict(one) for one in self.not_estimated],
            "assumptions": {key: list(value) for key, value in self.assumptions.items() if value},
        }


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest-rank percentile: the smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(-int(-share * len(ordered) // 1), 1) - 1]


KINDS = (
    (r"oom|fits", "oom and fits"),
    (r"weight|kv_|_kv|block|concurrency|cache", "inference memory"),
    (r"decode|output_tok|tpot|itl|inter_token|ttft|prefill|generat", "decode throughput"),
    (r"gib|_gb|mib|memory|_mb", "training memory"),
)


def kind_of(row: Row) -> str:
    """The goal that a quantity is held to."""
    if row.category.startswith("coll") or "all_reduce" in row.category:
        return "all-reduce"
    for pattern, kind in KINDS:
        if re.search(pattern, row.quantity):
            return kind
    return "decode throughput" if "infer" in row.category else "training throughput"


def measure(raws: Iterable[Raw]) -> Accuracy:
    """Predict every quantity that the planner knows of every point; a point that cannot be estimated is listed with why."""
    rows: list[Row] = []
    missed: list[NotEstimated] = []
    assumptions: dict[str, tuple[str, ...]] = {}
    for index, raw in enumerate(raws):
        name = str(raw.get("id", f"#{index}")) if isinstance(raw, dict) else f"#{index}"
        try:
            point = read_point(raw)
            found = list(_rows(point))
        except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError, AttributeError) as error:
            missed.append(
                NotEstimated(
                    name, f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
                )
            )
            continue
        assumptions[point.id] = tuple(point.assumptions)
        rows += found
        if not found:
            missed.append(
                NotEstimated(point.id, f"nothing under `measured` that is predicted: {', '.join(point.measured)}")
            )
    return Accuracy(tuple(rows), tuple(missed), assumptions)


def _rows(point: Point) -> Iterable[Row]:
    if point.category.startswith("coll") or "bytes" in point.measured or "bytes" in point.raw:
        predict = _collective(point)
    elif point.trains:
        predict = _training(point)
    else:
        predict = _inference(point)
    for quantity, measured in point.measured.items():
        if not isinstance(measured, int | float):
            continue
        predicted = predict(quantity.lower(), measured)
        if predicted is None:
            continue
        if not isinstance(measured, bool) and not (isfinite(measured) and measured > 0):
            raise ValueError(f"{quantity} {measured!r} is no measurement")
        if not isfinite(predicted):
            raise ValueError(f"{quantity}: the other fields give no finite number")
        error = (
            (0.0 if bool(predicted) == measured else 1.0)
            if isinstance(measured, bool)
            else predicted / float(measured) - 1
        )
        yield Row(point.id, point.category, quantity, measured, predicted, error)


Predict = Callable[[str, Any], float | bool | None]


def _collective(point: Point) -> Predict:
    given = point.raw | point.measured
    size = next((given[key] for key in ("bytes", "size_bytes", "message_bytes", "size") if given.get(key)), None)
    if size is None:
        raise ValueError("a collective without the bytes of its message")
    message = points.number(size, default=0)
    kind = (
        str(given.get("collective") or given.get("op") or "all_reduce")
        .lower()
        .replace("-", "_")
        .replace("allreduce", "all_reduce")
    )
    if kind not in get_args(Collective):
        raise ValueError(f"collective {kind!r} is not known; known are {', '.join(get_args(Collective))}")
    gpu = points.gpu_of(point)
    node = int(points.number(given.get("gpus_per_node"), default=8))
    group = Group(size=point.gpus, node=node)
    seconds = collective_s(cast(Collective, kind), message_bytes=message, gpu=gpu, group=group)

    def predict(quantity: str, _: Any) -> float | None:
        for ending, scale in (("_us", 1e6), ("_ms", 1e3), ("_s", 1.0)):
            if quantity.endswith(ending) and not re.search("gb|bw|bytes", quantity):
                return seconds * scale
        timed = any(re.search(r"_(us|ms|s)$", key) and not re.search("gb|bw", key) for key in point.measured)
        if "bw" in quantity and not timed:  # nothing but a bandwidth was published
            algorithm = message / seconds / 1e9
            return algorithm if "alg" in quantity else algorithm * 2 * (group.size - 1) / group.size
        return None

    return predict


MEMORY = re.compile(
    r"(peak|max|reserved|allocated|mem|vram|hbm).*_(gib|gb|mib|mb)(_per_\w+)?$|(gib|gb|mib|mb).*(peak|reserved|allocated)"
)


def _training(point: Point) -> Predict:
    run = point_runs.run_of(point)
    framework = point_runs.framework_for(point)
    shape, layout = run.shape, run.layout
    recompute = hardware_flops_share(run)

    def rate() -> float:
        """Tokens a second of one GPU."""
        return tokens_per_s_per_gpu(run, step_time(run, gpu=points.gpu_of(point)).value)

    def flops() -> float:
        """Model FLOPs of a token, in the convention of the source."""
        counted = shape.matmul_parameters
        text = point.text
        if framework.flops == "all" or re.search(r"6\s*\*?\s*n_?total|incl\w*\.? embedding|6n\b|2\*n\b", text):
            counted = shape.active_parameters
        halved = 0.5 if re.search(r"causal[^.]*hal|hal[^.]*causal", text) else 1.0
        return 6 * counted + halved * shape.attention_flops(seq=run.seq)

    def predict(quantity: str, measured: Any) -> float | bool | None:
        if quantity in ("oom", "fits"):
            used = memory(run, statistic="allocated").value + CONTEXT_GIB
            return (used > points.device_gib_of(point)) == (quantity == "oom")
        if MEMORY.search(quantity):
            return _memory(point, run, quantity, framework=framework)
        if re.search(r"tokens?_per_s|tok_s|tps\b|tgs\b|wps\b", quantity):
            return rate() * _gpus_counted(point, quantity)
        if re.search(r"(samples?|seqs?|sequences?)_per_s", quantity):
            return rate() * _gpus_counted(point, quantity) / run.seq
        if re.search(r"iter|step", quantity) and re.search(r"(^|_)(ms|s|secs?|seconds?)(_|\b)|time$", quantity):
            step = run.tokens_per_step / rate() / layout.gpus
            return step * (1000 if re.search(r"(^|_)ms(_|\b)", quantity) else 1)
        if "tflop" in quantity:
            hardware = re.search("achieved|hardware|hfu", quantity) or re.search(r"includ\w* recompute", point.text)
            per = rate() * flops() / 1e12 * (recompute if hardware and "model" not in quantity else 1)
            return per * _gpus_counted(point, quantity, default=1)
        if re.match(r"mfu|hfu", quantity):
            wide = "fp8 peak" in point.text or (framework.fp8_peak and run.kernels.fp8)
            peak = points.gpu_of(point).tflops_bf16 * (2 if wide else 1)
            share = rate() * flops() / 1e12 / peak * (recompute if quantity.startswith("hfu") else 1)
            return share * (100 if "pct" in quantity or "percent" in quantity or float(measured) > 1.5 else 1)
        return None

    return predict


def _gpus_counted(point: Point, quantity: str, default: int | None = None) -> int:
    """GPUs that a rate is of: one, a node, or all."""
    if re.search(r"(per_?|_)(gpu|device|rank|chip|accel)\b", quantity) or re.search(r"tgs\b|wps\b", quantity):
        return 1
    if "per_node" in quantity:
        return min(8, point.gpus)
    return point.gpus if default is None or "total" in quantity else default


def _memory(point: Point, run: Run, quantity: str, *, framework: Framework) -> float:
    """Peak memory in the unit that the source prints: mostly GiB, whether it says GB or GiB."""
    statistic = "allocated"
    if "reserved" in quantity or "nvidia-smi" in point.text:
        statistic = "reserved"
    whole_device = "nvidia-smi" in point.text
    stage = 0 if framework.reports == "first" and "max over ranks" not in point.text else None
    gib = memory(run, statistic="device" if whole_device else statistic, stage=stage).value
    if re.search(r"_mi?b(_|\b)", quantity):
        return gib * 1024
    decimal = framework.decimal or re.search(r"1e9|10\^9|10\*\*9", point.text)
    return gib * GIB / 1e9 if decimal and re.search(r"_gb(_|\b)", quantity) else gib


def _inference(point: Point) -> Predict:
    shape, form = points.shape_of(point), points.weight_format_of(point)
    layout = point_runs.layout_of(point, point_runs.framework_for(point))
    tp, pp, raw = layout.tp, layout.pp, point.raw
    if tp * pp == 1 and point.gpus > 1:
        tp = point.gpus
        point.assumptions.append(f"parallelism not said: tensor parallel over {tp} GPUs")
    kv_bytes = points.kv_bytes_of(point)
    prompt, output = (points.number(raw.get(key), default=0) for key in ("isl", "osl"))

    def server() -> Server:
        return Server(shape=shape, gpu=points.gpu_of(point), form=form, tp=tp, pp=pp, kv_bytes=kv_bytes)

    def kept():
        measured = point.measured
        context = {key: measured.get(key) for key in ("activation_gib", "non_torch_gib")}
        if any(value is not None for value in context.values()):
            point.assumptions.append("activation peak and non-torch memory as the point gives them")
        if "gpu_memory_utilization" not in raw:
            point.assumptions.append("GPU memory utilisation not said: 0.9")
        return cache(
            shape,
            form=form,
            device_gib=points.device_gib_of(point),
            utilization=points.number(raw.get("gpu_memory_utilization"), default=0.9),
            tp=tp,
            pp=pp,
            kv_bytes=kv_bytes,
            activation_gib=context["activation_gib"],
            non_torch_gib=context["non_torch_gib"],
        )

    def decode() -> float:
        batch = points.number(raw.get("micro_batch") or raw.get("batch"), default=1)
        return server().decode_s(
            batch=batch, context=prompt + output / 2 or points.number(raw.get("seq"), default=0) / 2
        )

    def saturated() -> float:
        return server().saturated_tokens_per_s(prompt=prompt, output=output, cache_tokens=kept().tokens)

    def predict(quantity: str, _: Any) -> float | bool | None:
        if quantity in ("oom", "fits"):
            if "gpu_memory_utilization" in raw:
                # A server that sets its cache aside at the start, and refuses where one request of full length does not fit.
                return (kept().tokens < max(points.number(raw.get("seq"), default=1), 1)) == (quantity == "oom")
            used = weight_bytes(shape, form=form, tp=tp, pp=pp) / GIB + CONTEXT_GIB
            return (used > points.device_gib_of(point)) == (quantity == "oom")
        if "weight" in quantity:
            gib = weight_bytes(shape, form=form, tp=tp, pp=pp) / GIB
            return gib * (1 if "per_gpu" in quantity or "total" not in quantity else tp * pp)
        if re.search("concurrency|max_seqs", quantity):
            length = points.number(raw.get("max_model_len") or raw.get("seq"), default=0)
            return kept().concurrency(tokens_per_sequence=length) if length else None
        if "block" in quantity and "size" not in quantity:
            return kept().blocks
        if re.search("(kv|cache).*tokens", quantity):
            return kept().tokens
        if re.search(r"kv_bytes_per_token|kv_cache_bytes_per_token", quantity):
            return shape.kv_bytes_per_token(bytes_per_value=kv_bytes)
        if re.search(r"kv.*_(gib|gb)|cache.*_(gib|gb)", quantity):
            return max(kept().memory.value, 0)
        if re.search(r"output_tok\w*_per_s|throughput", quantity) and prompt and output:
            return saturated() / (point.gpus if "per_gpu" in quantity else 1)
        if re.search(r"tokens?_per_s|tok_s", quantity) and "prefill" not in quantity:
            batch = points.number(raw.get("micro_batch") or raw.get("batch"), default=1)
            return batch / decode()
        if re.search(r"tpot|itl|ms_per_token|per_token.*_m?s\b|token_latency|decode.*_ms|inter_token", quantity):
            return decode() * (1000 if "ms" in quantity else 1)
        if re.search("ttft|prefill", quantity) and (prompt or raw.get("seq")):
            seconds = server().prefill_s(tokens=prompt or float(raw["seq"]))
            if "per_s" in quantity:
                return (prompt or float(raw["seq"])) / seconds
            return seconds * (1000 if "ms" in quantity else 1)
        return None

    return predict
