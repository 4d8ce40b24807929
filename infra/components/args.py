"""How the arguments of each component follow from the stack's values: the wiring of the graph, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass

from infra.catalog import Instance, instance
from infra.clouds import beside_pools, on_pool
from infra.components.alerts import series, unserved
from infra.components.autoscaler import METRIC, AutoscalerArgs
from infra.components.batch_inference import BatchInferenceArgs
from infra.components.common import Scope
from infra.components.data_job import DataJobArgs
from infra.components.identity import accounts, object_store_users, opened_urls
from infra.components.images import BuiltImageArgs, Package
from infra.components.inference_service import InferenceServiceArgs
from infra.components.model_registry import ModelRegistryArgs, access
from infra.components.monitoring import MonitoringArgs
from infra.components.network import NetworkArgs
from infra.components.node_pool import GpuNodePoolArgs
from infra.components.pipeline import Pipeline, helper_resources, pipeline, training_resources
from infra.components.promotion import PromotionArgs
from infra.components.router import RouterArgs
from infra.components.server import scraped_port
from infra.components.stage import Image
from infra.components.tenancy import TenancyArgs
from infra.components.training_job import TrainingJobArgs
from infra.planner import Plan
from infra.planner.training import ranks_per_node
from infra.spec import Batch, NodePool, Service, Stack, Training


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What every component's arguments are taken from."""

    stack: Stack
    scope: Scope
    plan: Plan

    @property
    def training(self) -> Training:
        """The stack's training, which the caller knows to be there."""
        assert self.stack.training is not None
        return self.stack.training

    @property
    def training_machine(self) -> Instance:
        return instance(self.stack.pool(self.training.pool).instance)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What the three Jobs of a training share."""

    image: Image
    pipeline: Pipeline


def tenancy(stack: Stack) -> TenancyArgs:
    return TenancyArgs(
        name=stack.platform.namespace,
        tenancy=stack.tenancy,
        gpu_resource=stack.platform.gpu_resource,
        gpus=sum(instance(pool.instance).gpus * pool.max_nodes for pool in stack.node_pools),
        accounts=accounts(stack),
        pull_secret=stack.images.pull_secret,
    )


def packages(stack: Stack) -> tuple[Package, ...]:
    """The programs that the stack runs, each of which has an image."""
    return (*(("trainer",) if stack.training else ()), *(("serving",) if stack.services or stack.batches else ()))


def node_pool(platform: Platform, pool: NodePool, images: Mapping[Package, Image]) -> GpuNodePoolArgs:
    stack = platform.stack
    users = {"trainer": [stack.training] if stack.training else [], "serving": stack.services}
    return GpuNodePoolArgs(
        scope=platform.scope,
        platform=stack.platform,
        pool=pool,
        machine=instance(pool.instance),
        placement=on_pool(stack, pool.name),
        trains=stack.training is not None and stack.training.pool == pool.name,
        images=tuple(image for package, image in images.items() if any(u.pool == pool.name for u in users[package])),
    )


def model_registry(platform: Platform) -> ModelRegistryArgs:
    stack = platform.stack
    return ModelRegistryArgs(
        scope=platform.scope, registry=stack.registry, storage=stack.storage, trains=stack.training is not None
    )


def image(platform: Platform, package: Package) -> BuiltImageArgs:
    opened = opened_urls(platform.stack)
    users = ("data", "train", "promote") if package == "trainer" else ("serve", "batch")
    training = platform.stack.training if package == "trainer" else None
    wanted = (*training.sinks, *(["lm_eval"] if training.evaluate.asks_harness else [])) if training else ()
    urls = tuple(url for user in users for url in opened.get(user, ()))
    return BuiltImageArgs(images=platform.stack.images, package=package, urls=urls, packages=wanted)


def stages(platform: Platform, trainer: Image) -> Stages:
    registry_url = access(platform.stack.registry, writes=True).url
    made = pipeline(
        platform.training, image_digest=trainer.digest, registry_url=registry_url, expected=_expected(platform)
    )
    return Stages(image=trainer, pipeline=made)


def _expected(platform: Platform) -> dict[str, float]:
    """What the planner thinks of a rank, for the trainer to hold what it measures against; to three digits, as it knows them."""
    run = platform.plan.training
    assert run is not None
    numbers = {
        "peak_flops_per_rank": run.peak_flops_per_rank,
        "step_s": run.step.value,
        "memory_bytes": run.allocated_bytes,
    }
    return {name: float(f"{number:.3g}") for name, number in numbers.items() if number is not None}


def data_job(platform: Platform, shared: Stages) -> DataJobArgs:
    training = platform.training
    return DataJobArgs(
        scope=platform.scope,
        model=training.name,
        pipeline=shared.pipeline,
        image=shared.image,
        placement=beside_pools(platform.stack, [training.pool]),
        resources=helper_resources(training, platform.training_machine),
        max_restarts=training.max_restarts,
    )


def training_job(platform: Platform, shared: Stages) -> TrainingJobArgs:
    training, machine = platform.training, platform.training_machine
    ranks = ranks_per_node(training, machine)
    return TrainingJobArgs(
        scope=platform.scope,
        training=training,
        pipeline=shared.pipeline,
        image=shared.image,
        placement=on_pool(platform.stack, training.pool),
        meeting_placement=beside_pools(platform.stack, [training.pool]),
        resources=training_resources(training, machine),
        ranks_per_node=ranks,
        gpus=ranks if machine.gpus else 0,
    )


def promotion(platform: Platform, shared: Stages) -> PromotionArgs:
    training = platform.training
    return PromotionArgs(
        scope=platform.scope,
        training=training,
        pipeline=shared.pipeline,
        image=shared.image,
        registry=access(platform.stack.registry, writes=True),
        placement=beside_pools(platform.stack, [training.pool]),
        resources=helper_resources(training, platform.training_machine),
    )


def inference_service(platform: Platform, service: Service, server: Image) -> InferenceServiceArgs:
    """`model_within_s`: twice the estimate of the training that makes the model, where it is this stack's."""
    plan = platform.plan
    hours = plan.training.hours.value if plan.training and platform.stack.trains(service) else 0
    return InferenceServiceArgs(
        scope=platform.scope,
        service=service,
        runtime=platform.stack.runtime(service),
        image=server,
        registry=access(platform.stack.registry, writes=False),
        placement=on_pool(platform.stack, service.pool),
        load_s=plan.service(service.name).load_s,
        kv_tokens=plan.service(service.name).kv_tokens,
        model_within_s=int(2 * hours * 3600),
        collector_url=collector.url if (collector := platform.stack.monitoring.collector) else None,
        shared_storage=platform.stack.storage.shared,
        storage_class=platform.stack.storage.class_name,
    )


def autoscaler(platform: Platform, service: Service) -> AutoscalerArgs:
    assert service.autoscaling is not None
    return AutoscalerArgs(
        scope=platform.scope,
        service=service.name,
        autoscaling=service.autoscaling,
        by_replica=platform.stack.runtime(service).counts_in_flight,
        prometheus_url=platform.stack.monitoring.prometheus_url,
        query=_in_flight(platform.stack, service),
    )


def _in_flight(stack: Stack, service: Service) -> str:
    """Requests that the replicas hold. Where there may be none to hold any: those too, of the last minute, that found none."""
    held = f"sum({series(METRIC, stack, service)})"
    if service.least_replicas:
        return held
    return f"({held} or vector(0)) + (sum(increase({unserved(stack, service)}[1m])) or vector(0))"


def batch_inference(platform: Platform, batch: Batch, server: Image) -> BatchInferenceArgs:
    return BatchInferenceArgs(
        scope=platform.scope,
        batch=batch,
        image=server,
        registry=access(platform.stack.registry, writes=False),
        placement=on_pool(platform.stack, batch.pool),
    )


def router(platform: Platform) -> RouterArgs:
    stack = platform.stack
    return RouterArgs(
        scope=platform.scope,
        router=stack.router,
        services=stack.services,
        runtimes=[stack.runtime(service) for service in stack.services],
        image=stack.images.router,
        placement=beside_pools(stack, [service.pool for service in stack.services]),
    )


def channel(platform: Platform, service: Service) -> str:
    """URL of the file that says which digest `service` serves."""
    return access(platform.stack.registry, writes=False).channel(service.model, service.channel)


def network(platform: Platform) -> NetworkArgs:
    stack = platform.stack
    logs_outside = stack.training is not None and "wandb" in stack.training.sinks
    return NetworkArgs(
        scope=platform.scope,
        trains=stack.training is not None,
        meets=stack.training is not None and stack.training.meets,
        serves=bool(stack.services),
        stores={service.name: service.stores for service in stack.services},
        collector=stack.monitoring.collector,
        scraped_ports=sorted({scraped_port(service, stack.runtime(service)) for service in stack.services}),
        client_namespaces=stack.tenancy.ingress_from_namespaces,
        public=stack.router.expose == "LoadBalancer",
        monitoring_namespace=stack.tenancy.monitoring_namespace if stack.monitoring.enabled else None,
        # Weights & Biases is HTTPS to somewhere, as an object store is.
        object_store_users=(*object_store_users(stack), *(("train",) if logs_outside else ())),
    )


def monitoring(platform: Platform) -> MonitoringArgs:
    return MonitoringArgs(scope=platform.scope, stack=platform.stack)
