"""A batch of requests as an Indexed Job: one pod a shard, each with the model, and no server between them and the answers."""

from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.batch import v1 as batch
from pulumi_kubernetes.core import v1 as core

from infra.clouds import Placement
from infra.components.common import REPLACE, SKIP_AWAIT, Scope, digest, resources, threads_from_limit
from infra.components.model_registry import RegistryAccess
from infra.components.pods import Claim, PodArgs, container, pod_template
from infra.components.stage import Image, failure_policy
from infra.spec import Batch
from infra.spec.batch import MOUNT_PATH

# From SIGTERM: what is under way is dropped, and answered by the next pod.
GRACE_S = 30


@dataclass(frozen=True, kw_only=True)
class BatchInferenceArgs:
    scope: Scope
    batch: Batch
    image: Image
    registry: RegistryAccess
    placement: Placement


class BatchInference(pulumi.ComponentResource):
    job_name: str

    def __init__(self, name: str, args: BatchInferenceArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:BatchInference", name, None, opts)
        asked = args.batch
        # Named after what it makes, so that another question is another Job, and more memory for the same one is not.
        makes = [asked.input, asked.output, asked.endpoint, asked.model, asked.channel, asked.shards, args.image.digest]
        self.job_name = f"batch-{asked.name}-{digest(makes)}"
        batch.Job(
            f"{name}-job",
            metadata=args.scope.meta(self.job_name, component="batch", annotations=SKIP_AWAIT | REPLACE),
            spec=batch.JobSpecArgs(
                completions=asked.shards,
                parallelism=asked.pods,
                completion_mode="Indexed",
                backoff_limit_per_index=asked.max_restarts,
                # A shard that is given up fails the batch at once: its answers would never be whole.
                max_failed_indexes=0,
                pod_failure_policy=failure_policy(),
                template=pod_template(args.scope, self._pod(args)),
            ),
            opts=pulumi.ResourceOptions(parent=self, depends_on=args.image.needs, delete_before_replace=True),
        )
        self.register_outputs({"job_name": self.job_name})

    def _pod(self, args: BatchInferenceArgs) -> PodArgs:
        asked = args.batch
        claims = list(args.registry.claims)
        if asked.volume_claim:
            claims.append(Claim(claim=asked.volume_claim, mount_path=MOUNT_PATH))
        return PodArgs(
            component="batch",
            instance=self.job_name,
            placement=args.placement,
            containers=[self._program(args, claims)],
            volumes=[claim.volume for claim in claims],
            grace_s=GRACE_S,
            restart_policy="Never",
        )

    def _program(self, args: BatchInferenceArgs, claims: list[Claim]) -> core.ContainerArgs:
        asked = args.batch
        flags = {
            "--input": asked.input,
            "--output": asked.output,
            "--endpoint": asked.endpoint,
            # JOB_COMPLETION_INDEX, which Kubernetes sets, says which of them a pod's is.
            "--shards": asked.shards,
            "--served-name": asked.model,
            "--max-model-len": asked.max_model_len,
            "--max-num-seqs": asked.max_num_seqs,
            "--kv-bytes": int(asked.kv_gib * 2**30),
            "--dtype": asked.dtype,
            "--quantize": asked.quantize,
            "--speculate-tokens": asked.speculate_tokens or None,
            "--tensor-parallel-size": asked.gpus if asked.gpus > 1 else None,
        }
        words = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
        return container(
            name="batch",
            image=args.image.reference,
            command=["python", "-m", "serving.offline", args.registry.channel(asked.model, asked.channel), *words],
            resources=resources(asked.resources, gpus=asked.gpus, gpu_resource=args.scope.gpu_resource),
            mounts=[claim.mount for claim in claims],
            variables=[threads_from_limit()],
        )
