"""What is seen of a stack: metrics, alerts, dashboards, spans; and what it may cost."""

from typing import Annotated, Literal

from pydantic import Field

from infra.spec.base import Name, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share, Spec


class Objectives(Spec):
    """What the alerts hold the services to."""

    ttft_p95_s: PositiveFloat = 2.0
    """Time to first token, 95th percentile, seconds."""
    tpot_p95_s: PositiveFloat = 0.2
    """Time per output token, 95th percentile, seconds."""
    availability: Share = 0.999
    """Share of requests answered without a server error."""


AlertName = Literal[
    "SlipwayTimeToFirstTokenHigh",
    "SlipwayTimePerTokenHigh",
    "SlipwayErrorBudgetBurning",
    "SlipwayNoReplicaReady",
    "SlipwayAtMaxReplicas",
    "SlipwayTrainingStalled",
    "SlipwayCheckpointOverdue",
    "SlipwayLossNotFinite",
    "SlipwayJobFailed",
]


class Alert(Spec):
    enabled: bool = True
    """False: it is not declared."""
    after_s: NonNegativeInt | None = None
    """Seconds that its condition holds before it fires; null: as long as suits what it tells."""


class Collector(Spec):
    """Where spans go, by OTLP over HTTP."""

    url: Annotated[str, Field(pattern=r"^https?://[^/:@]+:\d{1,5}$")]
    """Its address: `http://collector.observability:4318`."""
    namespace: Name | None = None
    """Namespace whose pods it is; null: it is outside of the cluster."""

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


class Monitoring(Spec):
    enabled: bool = True
    """ServiceMonitor, PodMonitor, PrometheusRule and Grafana dashboards (the operator's CRDs must be there)."""
    prometheus_url: str | None = None
    """Address of Prometheus inside the cluster, for what asks it: `http://prometheus-operated.monitoring:9090`."""
    scrape_interval_s: PositiveInt = 15
    """Seconds between scrapes."""
    labels: dict[str, str] = Field(default={"release": "prometheus"})
    """Labels by which the operator's Prometheus selects monitors and rules."""
    objectives: Objectives = Objectives()
    """Thresholds of the alerts."""
    alerts: dict[AlertName, Alert] = Field(default={})
    """What is other than usual of single alerts: `{SlipwayJobFailed: {enabled: false}}`."""
    namespace: str | None = None
    """Namespace of the dashboards' ConfigMaps; null: the stack's."""
    collector: Collector | None = None
    """OpenTelemetry collector that Slipway's servers send a span a request to; null: none."""


class Budget(Spec):
    usd_per_h: NonNegativeFloat | None = None
    """Most that the stack's nodes may cost in an hour at full scale, USD."""
    usd_per_run: NonNegativeFloat | None = None
    """Most that one training run may cost, USD."""
