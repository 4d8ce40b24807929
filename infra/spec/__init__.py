"""What a stack file says, as plain, frozen, validated values. Imports neither Pulumi nor torch."""

from infra.spec.base import Unplannable
from infra.spec.batch import Batch
from infra.spec.data import Data, Located
from infra.spec.judging import Evaluate, Gate
from infra.spec.learning import Lora, Optim
from infra.spec.load import StackError, line_finder, load, located, parse, read
from infra.spec.monitoring import Budget, Collector, Monitoring, Objectives
from infra.spec.platform import Images, NodePool, Platform, Quota, Registry, Storage, Tenancy
from infra.spec.routing import Router
from infra.spec.runtimes import Runtime
from infra.spec.serving import Autoscaling, Service, Slo, Store, Traffic
from infra.spec.shape import ModelShape, RopeScaling
from infra.spec.stack import Severity, Stack, schema, unknown
from infra.spec.training import Base, Parallelism, PodResources, Training

__all__ = [
    "Autoscaling",
    "Base",
    "Batch",
    "Budget",
    "Collector",
    "Data",
    "Evaluate",
    "Gate",
    "Images",
    "Located",
    "Lora",
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
    "RopeScaling",
    "Router",
    "Runtime",
    "Service",
    "Severity",
    "Slo",
    "Stack",
    "StackError",
    "Storage",
    "Store",
    "Tenancy",
    "Traffic",
    "Training",
    "Unplannable",
    "line_finder",
    "load",
    "located",
    "parse",
    "read",
    "schema",
    "unknown",
]
