"""Metrics, alerts, dashboards: objects of the Prometheus Operator, and ConfigMaps that Grafana's sidecar picks up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pulumi
from pulumi_kubernetes.apiextensions import CustomResource
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import ObjectMetaArgs

from infra.components.alerts import rule_groups
from infra.components.common import Scope, component_selector, selector
from infra.components.dashboards import serving_dashboard, training_dashboard
from infra.components.inference_service import SCRAPED
from infra.components.recordings import relabelings
from infra.components.server import scraped_port
from infra.spec import Service, Stack

API = "monitoring.coreos.com/v1"
# Of a gang rank 0 alone has metrics, and it is in the pod of index 0: the others would be targets that are always down.
RANK_0 = {
    "sourceLabels": ["__meta_kubernetes_pod_label_batch_kubernetes_io_job_completion_index"],
    "regex": "0",
    "action": "keep",
}


@dataclass(frozen=True, kw_only=True)
class MonitoringArgs:
    scope: Scope
    stack: Stack


class Monitoring(pulumi.ComponentResource):
    def __init__(self, name: str, args: MonitoringArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:Monitoring", name, None, opts)
        stack = args.stack
        for service in stack.services:
            self._custom(name, "ServiceMonitor", service.name, args, _service_monitor(service, stack))
        if stack.services:
            self._custom(name, "PodMonitor", "router", args, _pod_monitor("router", stack))
            self._dashboard(name, "serving", serving_dashboard(stack), args)
        if stack.training:
            self._custom(name, "PodMonitor", "training", args, _pod_monitor("train", stack, relabelings=[RANK_0]))
            self._dashboard(name, "training", training_dashboard(stack), args)
        if groups := rule_groups(stack):
            self._custom(name, "PrometheusRule", "objectives", args, {"groups": groups})
        self.register_outputs({})

    def _custom(self, name: str, kind: str, object_name: str, args: MonitoringArgs, spec: dict[str, Any]) -> None:
        labels = args.scope.labels("monitoring", object_name) | args.stack.monitoring.labels
        CustomResource(
            f"{name}-{object_name}-{kind.lower()}",
            api_version=API,
            kind=kind,
            metadata=ObjectMetaArgs(name=object_name, namespace=args.scope.namespace, labels=labels),
            spec=spec,
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _dashboard(self, name: str, subject: str, text: str, args: MonitoringArgs) -> None:
        """In the namespace that Grafana's sidecar watches, where the stack names one; so the name carries the stack's."""
        elsewhere = args.stack.monitoring.namespace
        scope = replace(args.scope, namespace=elsewhere) if elsewhere else args.scope
        object_name = f"slipway-{subject}-{args.stack.platform.namespace}"
        core.ConfigMap(
            f"{name}-{subject}-dashboard",
            metadata=ObjectMetaArgs(
                name=object_name,
                namespace=scope.namespace,
                labels=scope.labels("monitoring", object_name) | {"grafana_dashboard": "1"},
            ),
            data={f"{object_name}.json": text},
            opts=pulumi.ResourceOptions(parent=self),
        )


def _service_monitor(service: Service, stack: Stack) -> dict[str, Any]:
    """Each replica once, by the headless Service, under Slipway's names; the service's name is the label `inference_service`."""
    runtime = stack.runtime(service)
    endpoint: dict[str, Any] = {
        "port": scraped_port(service, runtime),
        "path": runtime.metrics.path,
        "interval": _interval(stack),
        "relabelings": [{"targetLabel": "inference_service", "replacement": service.name}],
    }
    if renamed := relabelings(runtime):
        endpoint["metricRelabelings"] = renamed
    return {"selector": {"matchLabels": selector("serve", service.name) | SCRAPED}, "endpoints": [endpoint]}


def _pod_monitor(component: str, stack: Stack, *, relabelings: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    endpoint: dict[str, Any] = {"port": "metrics", "path": "/metrics", "interval": _interval(stack)}
    if relabelings:
        endpoint["relabelings"] = list(relabelings)
    return {"selector": {"matchLabels": component_selector(component)}, "podMetricsEndpoints": [endpoint]}


def _interval(stack: Stack) -> str:
    return f"{stack.monitoring.scrape_interval_s}s"
