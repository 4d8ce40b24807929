"""The Job that turns a corpus into a dataset: tokenizer, token shards, manifest."""

from dataclasses import dataclass

import pulumi

from infra.clouds import Placement
from infra.components.common import Scope, resources, threads_from_limit
from infra.components.pipeline import Pipeline
from infra.components.pods import PodArgs, container
from infra.components.stage import CONFIG_MOUNT, DATA, Image, declare_config, declare_job
from infra.spec import PodResources


@dataclass(frozen=True, kw_only=True)
class DataJobArgs:
    scope: Scope
    model: str
    pipeline: Pipeline
    image: Image
    placement: Placement
    resources: PodResources
    max_restarts: int


class DataJob(pulumi.ComponentResource):
    def __init__(self, name: str, args: DataJobArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:DataJob", name, None, opts)
        self.job_name = f"data-{args.model}-{args.pipeline.data_digest}"
        files = {"data.yaml": args.pipeline.data}
        config = declare_config(self, name, object_name=self.job_name, component="data", scope=args.scope, files=files)
        program = ["python", "-m", "trainer.data", "--config", "/config/data.yaml"]
        places = args.pipeline.data_places
        prepare = container(
            name="data",
            image=args.image.reference,
            command=[*program, f"out={args.pipeline.dataset}", *args.pipeline.data_words],
            resources=resources(args.resources, gpu_resource=args.scope.gpu_resource),
            mounts=[CONFIG_MOUNT, DATA.mount, *(place.mount for place in places)],
            variables=[threads_from_limit()],
        )
        declare_job(
            self,
            f"{name}-job",
            object_name=self.job_name,
            scope=args.scope,
            image=args.image,
            pod=PodArgs(
                component="data",
                instance=self.job_name,
                placement=args.placement,
                containers=[prepare],
                volumes=[place.volume for place in places],
                grace_s=30,
            ),
            claims=[DATA],
            needs=[config],
            max_restarts=args.max_restarts,
        )
        self.register_outputs({"job_name": self.job_name})
