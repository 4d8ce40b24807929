"""What a stack is made of: Pulumi components, one a file. `args` says how each follows from the stack's values."""

from infra.components.autoscaler import Autoscaler
from infra.components.batch_inference import BatchInference
from infra.components.data_job import DataJob
from infra.components.inference_service import InferenceService
from infra.components.model_registry import ModelRegistry
from infra.components.monitoring import Monitoring
from infra.components.network import Network
from infra.components.node_pool import GpuNodePool
from infra.components.promotion import Promotion
from infra.components.router import Router
from infra.components.tenancy import Tenancy
from infra.components.training_job import TrainingJob

__all__ = [
    "Autoscaler",
    "BatchInference",
    "DataJob",
    "GpuNodePool",
    "InferenceService",
    "ModelRegistry",
    "Monitoring",
    "Network",
    "Promotion",
    "Router",
    "Tenancy",
    "TrainingJob",
]
