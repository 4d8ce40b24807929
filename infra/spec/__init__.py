"""What a stack file says, as plain, frozen, validated values. Imports neither Pulumi nor torch."""

from infra.spec.load import StackError, load, parse, read
from infra.spec.platform import Images, NodePool, Platform, Quota, Registry, Storage, Tenancy
from infra.spec.serving import Autoscaling, Budget, Monitoring, Objectives, Router, Service, Slo, Traffic
from infra.spec.stack import Severity, Stack, schema, unknown
from infra.spec.training import Data, Evaluate, Gate, ModelShape, Optim, Parallelism, PodResources, Training
from infra.spec.runtimes import Runtime

__all__ = [
    "Autoscaling",
    "Budget",
    "Data",
    "Evaluate",
    "Gate",
    "Images",
    "ModelShape",
    "Monitoring",
    "NodePool",
    "Objectives",
    "Optim",
    "Parallelism",
    "Platform",
    "PodResources",
    "Quota",
    "Registry",
    "Router",
    "Service",
    "Severity",
    "Slo",
    "Stack",
    "StackError",
    "Storage",
    "Tenancy",
    "Traffic",
    "Runtime",
    "Training",
    "load",
    "parse",
    "read",
    "schema",
    "unknown",
]
