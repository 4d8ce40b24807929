"""Replicas by requests in flight: waiting and running, a signal that has no ceiling, and so always fires."""

from dataclasses import dataclass
from typing import Any

import pulumi
from pulumi_kubernetes.apiextensions import CustomResource
from pulumi_kubernetes.autoscaling import v2 as autoscaling
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs

from infra.components.common import SKIP_AWAIT, Scope
from infra.spec import Autoscaling

POLL_S = 10
"""Between KEDA's looks at a service that has no replica."""
METRIC = "slipway_serve_requests_in_flight"


@dataclass(frozen=True, kw_only=True)
class AutoscalerArgs:
    scope: Scope
    service: str
    """Name of the Deployment."""
    autoscaling: Autoscaling
    by_replica: bool
    """Each replica says how many requests it holds; else the router does, for all of them together."""
    prometheus_url: str | None
    """Where KEDA finds Prometheus."""
    query: str
    """PromQL of the requests that all replicas hold together, and of those that found none."""


class Autoscaler(pulumi.ComponentResource):
    """A HorizontalPodAutoscaler on `METRIC`, which a metrics adapter serves from Prometheus, by pod or as an external metric; or
    KEDA's ScaledObject, which makes one and asks Prometheus itself."""

    def __init__(self, name: str, args: AutoscalerArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:Autoscaler", name, None, opts)
        if args.autoscaling.by == "keda":
            self._scaled_object(name, args)
        else:
            self._autoscaler(name, args)
        self.register_outputs({})

    def _autoscaler(self, name: str, args: AutoscalerArgs) -> None:
        wanted = args.autoscaling
        autoscaling.HorizontalPodAutoscaler(
            f"{name}-hpa",
            metadata=args.scope.meta(args.service, component="serve", annotations=SKIP_AWAIT),
            spec=autoscaling.HorizontalPodAutoscalerSpecArgs(
                scale_target_ref=autoscaling.CrossVersionObjectReferenceArgs(
                    api_version="apps/v1", kind="Deployment", name=args.service
                ),
                min_replicas=wanted.min_replicas,
                max_replicas=wanted.max_replicas,
                metrics=[_metric(args)],
                behavior=_behavior(wanted.scale_down_after_s),
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _scaled_object(self, name: str, args: AutoscalerArgs) -> None:
        wanted = args.autoscaling
        trigger = {
            "type": "prometheus",
            "metricType": "AverageValue",
            "metadata": {
                "serverAddress": args.prometheus_url,
                "query": args.query,
                "threshold": f"{wanted.target_in_flight:g}",
            },
        }
        CustomResource(
            f"{name}-scaledobject",
            api_version="keda.sh/v1alpha1",
            kind="ScaledObject",
            metadata=args.scope.meta(args.service, component="serve", annotations=SKIP_AWAIT),
            spec={
                "scaleTargetRef": {"name": args.service},
                "minReplicaCount": wanted.min_replicas,
                "maxReplicaCount": wanted.max_replicas,
                "pollingInterval": POLL_S,
                "cooldownPeriod": wanted.scale_down_after_s,
                "triggers": [trigger],
                "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _rules(wanted.scale_down_after_s)}}
                # An autoscaler that comes after it brings nothing back from none.
                | ({"restoreToOriginalReplicaCount": True} if wanted.min_replicas == 0 else {}),
            },
            opts=pulumi.ResourceOptions(parent=self),
        )


def _metric(args: AutoscalerArgs) -> autoscaling.MetricSpecArgs:
    """Either way the target is what one replica should hold: of an external metric, `AverageValue` is its share."""
    amount = _quantity(args.autoscaling.target_in_flight)
    target = autoscaling.MetricTargetArgs(type="AverageValue", average_value=amount)
    if args.by_replica:
        metric = autoscaling.MetricIdentifierArgs(name=METRIC)
        return autoscaling.MetricSpecArgs(
            type="Pods", pods=autoscaling.PodsMetricSourceArgs(metric=metric, target=target)
        )
    selector = LabelSelectorArgs(match_labels={"inference_service": args.service})
    metric = autoscaling.MetricIdentifierArgs(name=METRIC, selector=selector)
    return autoscaling.MetricSpecArgs(
        type="External", external=autoscaling.ExternalMetricSourceArgs(metric=metric, target=target)
    )


def _behavior(scale_down_after_s: int) -> autoscaling.HorizontalPodAutoscalerBehaviorArgs:
    rules = _rules(scale_down_after_s)
    up, down = (
        autoscaling.HPAScalingRulesArgs(
            stabilization_window_seconds=rule["stabilizationWindowSeconds"],
            policies=[
                autoscaling.HPAScalingPolicyArgs(type=p["type"], value=p["value"], period_seconds=p["periodSeconds"])
                for p in rule["policies"]
            ],
        )
        for rule in (rules["scaleUp"], rules["scaleDown"])
    )
    return autoscaling.HorizontalPodAutoscalerBehaviorArgs(scale_up=up, scale_down=down)


def _rules(scale_down_after_s: int) -> dict[str, Any]:
    """Up at once, at most doubling every 15 s; down after a quiet window, one replica a minute: loading a model is dear."""
    double = {"type": "Percent", "value": 100, "periodSeconds": 15}
    one = {"type": "Pods", "value": 1, "periodSeconds": 60}
    return {
        "scaleUp": {"stabilizationWindowSeconds": 0, "policies": [double]},
        "scaleDown": {"stabilizationWindowSeconds": scale_down_after_s, "policies": [one]},
    }


def _quantity(amount: float) -> str:
    return str(int(amount)) if amount == int(amount) else f"{round(amount * 1000)}m"
