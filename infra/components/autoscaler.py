"""Replicas by requests in flight: waiting and running, a signal that has no ceiling, and so always fires."""

from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.autoscaling import v2 as autoscaling
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs

from infra.components.common import Scope
from infra.spec import Autoscaling

METRIC = "slipway_serve_requests_in_flight"


@dataclass(frozen=True, kw_only=True)
class AutoscalerArgs:
    scope: Scope
    service: str
    """Name of the Deployment."""
    autoscaling: Autoscaling
    by_replica: bool
    """Each replica says how many requests it holds; else the router does, for all of them together."""


class Autoscaler(pulumi.ComponentResource):
    """A HorizontalPodAutoscaler on `METRIC`, which a metrics adapter serves from Prometheus, by pod or as an external metric."""

    def __init__(self, name: str, args: AutoscalerArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:Autoscaler", name, None, opts)
        wanted = args.autoscaling
        autoscaling.HorizontalPodAutoscaler(
            f"{name}-hpa",
            metadata=args.scope.meta(args.service, component="serve", annotations={"pulumi.com/skipAwait": "true"}),
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
        self.register_outputs({})


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
    """Up at once, at most doubling every 15 s; down after a quiet window, one replica a minute: loading a model is dear."""
    return autoscaling.HorizontalPodAutoscalerBehaviorArgs(
        scale_up=autoscaling.HPAScalingRulesArgs(
            stabilization_window_seconds=0,
            policies=[autoscaling.HPAScalingPolicyArgs(type="Percent", value=100, period_seconds=15)],
        ),
        scale_down=autoscaling.HPAScalingRulesArgs(
            stabilization_window_seconds=scale_down_after_s,
            policies=[autoscaling.HPAScalingPolicyArgs(type="Pods", value=1, period_seconds=60)],
        ),
    )


def _quantity(amount: float) -> str:
    return str(int(amount)) if amount == int(amount) else f"{round(amount * 1000)}m"
