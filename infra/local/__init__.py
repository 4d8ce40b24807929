"""`slipway local`: rendered Kubernetes manifests, run as processes on one machine.

It knows Kubernetes objects only, and nothing else of Slipway. `client` is what a caller uses; the supervisor that it
starts owns the processes and outlives the caller.
"""

from infra.local.client import Down, Event, LocalError, LogLine, down, logs, status, up
from infra.local.secrets import Secrets
from infra.local.status import PodStatus, Status, WorkloadStatus

__all__ = [
    "Down",
    "Event",
    "LocalError",
    "LogLine",
    "PodStatus",
    "Secrets",
    "Status",
    "WorkloadStatus",
    "down",
    "logs",
    "status",
    "up",
]
