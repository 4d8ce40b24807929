"""From GPUs to a served model: data → train → evaluate → gate → registry → serve → scale → watch, declared once.

`pulumi preview`, `pulumi up` and `slipway render` run this program; stacks differ by their `Pulumi.<stack>.yaml` only.
"""

from pathlib import Path

import pulumi

from infra.checks import Refused, enforce, enforce_directories
from infra.components import (
    Autoscaler,
    BatchInference,
    DataJob,
    GpuNodePool,
    InferenceService,
    ModelRegistry,
    Monitoring,
    Network,
    Promotion,
    Router,
    Tenancy,
    TrainingJob,
    args,
)
from infra.components.config import runs_here, stack_from_config, stack_path
from infra.components.images import BuiltImage, Package
from infra.components.stage import Image
from infra.planner import plan, to_json
from infra.spec import Stack, located


def declare(stack: Stack) -> None:
    """The graph. Raises ValueError for a stack that cannot work, before anything is declared."""
    planned = plan(stack)
    stack = planned.stack  # with plain values where it says `auto`
    findings = enforce(stack, planned)
    enforce_directories(stack, here=runs_here())

    tenancy = Tenancy("tenancy", args.tenancy(stack))
    platform = args.Platform(stack=stack, scope=tenancy.scope, plan=planned)
    images: dict[Package, Image] = {
        package: BuiltImage(package, args.image(platform, package)).image for package in args.packages(stack)
    }
    for pool in stack.node_pools:
        GpuNodePool(f"pool-{pool.name}", args.node_pool(platform, pool, images))
    ModelRegistry("registry", args.model_registry(platform))
    if stack.training:
        declare_training(platform, images["trainer"])
    if stack.services:
        declare_serving(platform, images["serving"])
    if stack.batches:
        declare_batches(platform, images["serving"])
    if stack.tenancy.network_policies:
        Network("network", args.network(platform))
    if stack.monitoring.enabled:
        Monitoring("monitoring", args.monitoring(platform))
    pulumi.export("plan", to_json(planned))
    pulumi.export("findings", [str(finding) for finding in findings])
    for finding in findings:
        pulumi.log.warn(str(finding))


def declare_training(platform: args.Platform, trainer: Image) -> None:
    """Data → train → evaluate → gate → registry: three Jobs, each named by the digest of what it makes."""
    stages = args.stages(platform, trainer)
    data = DataJob("data", args.data_job(platform, stages))
    training = TrainingJob("train", args.training_job(platform, stages))
    promotion = Promotion("promote", args.promotion(platform, stages))
    pulumi.export("jobs", [data.job_name, *training.job_names, promotion.job_name])


def declare_serving(platform: args.Platform, server: Image) -> None:
    """Registry → servers → router. The servers wait for their channel, so that the first `up` of a stack ends at once."""
    for service in platform.stack.services:
        InferenceService(service.name, args.inference_service(platform, service, server))
        if service.autoscaling:
            Autoscaler(service.name, args.autoscaler(platform, service))
    router = Router("router", args.router(platform))
    pulumi.export("endpoint", router.endpoint)
    pulumi.export("channels", {service.name: args.channel(platform, service) for service in platform.stack.services})


def declare_batches(platform: args.Platform, server: Image) -> None:
    """Registry → answers, with no server between."""
    batches = [
        BatchInference(f"batch-{batch.name}", args.batch_inference(platform, batch, server))
        for batch in platform.stack.batches
    ]
    pulumi.export("batches", [batch.job_name for batch in batches])


file = stack_path(Path(__file__).parent)
try:
    with located(file):
        declare(stack_from_config(Path(__file__).parent))
except Refused as refused:
    error = Refused(refused.findings, file=file if file.is_file() else None)
    raise pulumi.RunError(str(error)) from error
except ValueError as error:
    # The program's user reads what is wrong with the stack file, and no traceback.
    raise pulumi.RunError(str(error)) from error
