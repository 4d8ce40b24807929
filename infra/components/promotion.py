"""The Job that measures what was trained and, when the gate passes, publishes it and moves the channel."""

from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.core import v1 as core

from infra.clouds import Placement
from infra.components.common import Scope, resources, threads_from_limit
from infra.components.model_registry import RegistryAccess
from infra.components.pipeline import Pipeline
from infra.components.pods import PodArgs, container
from infra.components.stage import CONFIG_MOUNT, DATA, RUNS, WAIT, Image, declare_config, declare_job, wait_for
from infra.spec import PodResources, Training


@dataclass(frozen=True, kw_only=True)
class PromotionArgs:
    scope: Scope
    training: Training
    pipeline: Pipeline
    image: Image
    registry: RegistryAccess
    placement: Placement
    resources: PodResources


class Promotion(pulumi.ComponentResource):
    def __init__(self, name: str, args: PromotionArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:Promotion", name, None, opts)
        self.job_name = f"promote-{args.training.name}-{args.pipeline.promote_digest}"
        files = {"evaluate.yaml": args.pipeline.evaluate, "publish.yaml": args.pipeline.publish}
        config = declare_config(
            self, name, object_name=self.job_name, component="promote", scope=args.scope, files=files
        )
        claims = [DATA, RUNS, *args.registry.claims]
        wait = resources(WAIT, gpu_resource=args.scope.gpu_resource)
        declare_job(
            self,
            f"{name}-job",
            object_name=self.job_name,
            scope=args.scope,
            image=args.image,
            pod=PodArgs(
                component="promote",
                instance=self.job_name,
                placement=args.placement,
                init_containers=[
                    wait_for(args.image, f"{args.pipeline.run}/model/slipway.json", wait, [RUNS]),
                    self._evaluate(args),
                ],
                containers=[self._publish(args)],
                volumes=[place.volume for place in args.pipeline.evaluate_places],
                grace_s=30,
            ),
            claims=claims,
            needs=[config],
            max_restarts=args.training.max_restarts,
        )
        self.register_outputs({"job_name": self.job_name})

    def _evaluate(self, args: PromotionArgs) -> core.ContainerArgs:
        pipeline = args.pipeline
        words, places = pipeline.evaluate_words, [place.mount for place in pipeline.evaluate_places]
        paths = [f"model={pipeline.run}/model", f"data={pipeline.dataset}", f"out={pipeline.evaluation}"]
        return container(
            name="evaluate",
            image=args.image.reference,
            command=["python", "-m", "trainer.evaluate", "--config", "/config/evaluate.yaml", *paths, *words],
            resources=resources(args.resources, gpu_resource=args.scope.gpu_resource),
            mounts=[CONFIG_MOUNT, DATA.mount, RUNS.mount, *places],
            variables=[threads_from_limit()],
        )

    def _publish(self, args: PromotionArgs) -> core.ContainerArgs:
        pipeline, training = args.pipeline, args.training
        what = [f"model={pipeline.run}/model", f"report={pipeline.evaluation}/evaluation.json"]
        where = [f"registry={args.registry.url}", f"name={training.name}", f"channel={training.channel}"]
        return container(
            name="publish",
            image=args.image.reference,
            command=["python", "-m", "trainer.publish", "--config", "/config/publish.yaml", *what, *where],
            resources=resources(args.resources, gpu_resource=args.scope.gpu_resource),
            mounts=[CONFIG_MOUNT, RUNS.mount, *(claim.mount for claim in args.registry.claims)],
            variables=[threads_from_limit()],
        )
