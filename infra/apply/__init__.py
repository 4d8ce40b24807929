"""`slipway apply`: a stack's rendered objects brought to a live cluster, without the Pulumi CLI.

Server-side apply, so that what others set on an object stays theirs; an inventory in the cluster, so that what a stack no
longer declares is removed, and nothing else; then, if asked for, waiting until the stack answers.
"""

from infra.apply.client import ApiError, Cluster
from infra.apply.objects import Applied, Key, apply, destroy
from infra.apply.settle import Unsettled, settle

__all__ = ["ApiError", "Applied", "Cluster", "Key", "Unsettled", "apply", "destroy", "settle"]
