"""Grafana dashboards as JSON, built with Grafana's own SDK: serving and training, with the objectives drawn in."""

from collections.abc import Sequence

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.builders.common import GraphThresholdsStyleConfig
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphTresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Threshold, ThresholdsMode

from infra.catalog import instance
from infra.components.alerts import error_share, p95, series
from infra.spec import Service, Stack

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH, HEIGHT = 12, 8


def serving_dashboard(stack: Stack) -> str:
    """One row of panels a service: latencies against their objectives, load, errors, cache."""
    board = _board(stack, "serving")
    for service in stack.services:
        board = board.with_row(dashboard.Row(service.name))
        for panel in _service_panels(stack, service):
            board = board.with_panel(panel)
    return _json(board)


def training_dashboard(stack: Stack) -> str:
    """Loss, speed, gradient norm, learning rate, checkpoints; what was measured to what was planned."""
    board = _board(stack, "training")
    panels = [
        _panel("Loss", "short", [("loss", series("slipway_train_loss", stack))]),
        _panel("Tokens per second", "short", [("tokens/s", series("slipway_train_tokens_per_second", stack))]),
        _panel("Gradient norm", "short", [("norm", series("slipway_train_grad_norm", stack))]),
        _panel("Learning rate", "short", [("rate", series("slipway_train_learning_rate", stack))]),
        _panel(
            "Steps",
            "short",
            [
                ("now", series("slipway_train_step", stack)),
                ("saved", series("slipway_train_last_checkpoint_step", stack)),
                ("all", series("slipway_train_steps", stack)),
            ],
        ),
        _panel("Time of a checkpoint", "s", [("save", series("slipway_train_checkpoint_seconds", stack))]),
        _panel(
            "Measured to planned",
            "percentunit",
            [
                ("time of a step", series("slipway_train_step_to_planned_ratio", stack)),
                ("memory", series("slipway_train_memory_to_planned_ratio", stack)),
            ],
            limit=1,
        ),
        *_flops(stack),
        _panel(
            "Where the time goes",
            "percentunit",
            [
                ("goodput", series("slipway_train_goodput_ratio", stack)),
                ("waiting for data", series("slipway_train_data_wait_ratio", stack)),
            ],
        ),
    ]
    for panel in panels:
        board = board.with_panel(panel)
    return _json(board)


def _flops(stack: Stack) -> list[timeseries.Panel]:
    """Of machines whose peak the catalogue knows: the trainer measures nothing against a peak that nobody told it."""
    assert stack.training is not None
    if instance(stack.pool(stack.training.pool).instance).gpu is None:
        return []
    of_peak = [("MFU", series("slipway_train_mfu_ratio", stack)), ("HFU", series("slipway_train_hfu_ratio", stack))]
    return [_panel("FLOPs of the peak", "percentunit", of_peak)]


def _service_panels(stack: Stack, service: Service) -> list[timeseries.Panel]:
    """The panels of what the service's runtime measures, or the router for it."""
    goals, runtime = stack.monitoring.objectives, stack.runtime(service)
    in_flight = series("slipway_serve_requests_in_flight", stack, service)
    by_outcome = f"sum by (outcome) (rate({series('slipway_serve_requests_total', stack, service)}[5m]))"
    output = f"sum(rate({series('slipway_serve_output_tokens_total', stack, service)}[5m]))"
    ttft, tpot = (p95(f"slipway_serve_{name}_seconds", stack, service) for name in ("ttft", "tpot"))
    target = service.autoscaling.target_in_flight if service.autoscaling else None
    kv_used = series("slipway_serve_kv_used_ratio", stack, service)
    panels = {
        "slipway_serve_ttft_seconds": _panel("Time to first token, p95", "s", [("p95", ttft)], limit=goals.ttft_p95_s),
        "slipway_serve_tpot_seconds": _panel(
            "Time per output token, p95", "s", [("p95", tpot)], limit=goals.tpot_p95_s
        ),
        "in flight": _panel("Requests in flight, by replica", "short", [("{{pod}}", in_flight)], limit=target),
        "outcomes": _panel("Requests by outcome", "reqps", [("{{outcome}}", by_outcome)]),
        "errors": _panel(
            "Errors", "percentunit", [("share", error_share(stack, service, "5m"))], limit=1 - goals.availability
        ),
        "slipway_serve_output_tokens_total": _panel("Output tokens per second", "short", [("tokens/s", output)]),
        "slipway_serve_kv_used_ratio": _panel("KV cache in use", "percentunit", [("{{pod}}", kv_used)]),
        "ready": _panel(
            "Replicas ready", "short", [("ready", f"sum({series('slipway_serve_ready', stack, service)})")]
        ),
    }
    return [panel for of, panel in panels.items() if not of.startswith("slipway_") or runtime.emits(of)]


def _board(stack: Stack, subject: str) -> dashboard.Dashboard:
    namespace = stack.platform.namespace
    return (
        dashboard.Dashboard(f"Slipway {subject}: {namespace}")
        .uid(f"slipway-{subject}-{namespace}"[:40])
        .tags(["slipway"])
        .readonly()
        .refresh("30s")
        .time("now-3h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
    )


def _panel(
    title: str, unit: str, queries: Sequence[tuple[str, str]], *, limit: float | None = None
) -> timeseries.Panel:
    panel = timeseries.Panel().title(title).unit(unit).datasource(SOURCE).min(0).span(WIDTH).height(HEIGHT)
    for ref, (legend, expression) in zip("ABC", queries, strict=False):
        panel = panel.with_target(prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(ref))
    if limit is None:
        return panel
    steps = [Threshold(value=None, color="green"), Threshold(value=limit, color="red")]
    marks = dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
    line = GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.LINE)
    return panel.thresholds(marks).thresholds_style(line)


def _json(board: dashboard.Dashboard) -> str:
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build())
