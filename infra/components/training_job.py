"""The training run: an Indexed Job of one pod a node, and the headless Service by which its ranks meet.

Each pod waits for the dataset in an init container, which holds the pod's GPUs: the gang's nodes are being made during that
time, and pods that came later could find them taken. The price is idle GPUs for as long as the data takes, once for a dataset.
Kubernetes starts the pods of a Job one by one: a gang that fits its pool, which the checks hold, always comes together.
"""

from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs

from infra.clouds import Placement
from infra.components.common import SKIP_AWAIT, Scope, env, memory_quantity, resources, selector
from infra.components.pipeline import Pipeline
from infra.components.pods import PodArgs, container
from infra.components.stage import CONFIG_MOUNT, DATA, RUNS, WAIT, Image, declare_config, declare_job, wait_for
from infra.spec import PodResources, Training

RENDEZVOUS_PORT, METRICS_PORT = 29400, 9400
# SIGTERM → checkpoint of the step that is under way → exit 75.
GRACE_S = 300
SHM_MOST_GIB = 16


@dataclass(frozen=True, kw_only=True)
class TrainingJobArgs:
    scope: Scope
    training: Training
    pipeline: Pipeline
    image: Image
    placement: Placement
    resources: PodResources
    ranks_per_node: int
    gpus: int
    """GPUs of one pod; 0 to train on CPUs."""


class TrainingJob(pulumi.ComponentResource):
    def __init__(self, name: str, args: TrainingJobArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:TrainingJob", name, None, opts)
        self.job_name = f"train-{args.training.name}-{args.pipeline.train_digest}"
        files = {"train.yaml": args.pipeline.train}
        config = declare_config(self, name, object_name=self.job_name, component="train", scope=args.scope, files=files)
        meeting = self._rendezvous(name, args.scope)
        wait = resources(WAIT, gpu_resource=args.scope.gpu_resource)
        declare_job(
            self,
            f"{name}-job",
            object_name=self.job_name,
            scope=args.scope,
            image=args.image,
            pod=PodArgs(
                component="train",
                instance=self.job_name,
                placement=args.placement,
                affinity=_same_zone(self.job_name) if args.training.nodes > 1 else None,
                init_containers=[wait_for(args.image, f"{args.pipeline.dataset}/manifest.json", wait, [DATA])],
                containers=[self._launch(args)],
                volumes=[_shared_memory(args.resources), *(place.volume for place in args.pipeline.train_places)],
                # Karpenter leaves the node alone until the pod is done; a spot interruption comes all the same.
                annotations={"karpenter.sh/do-not-disrupt": "true"},
                grace_s=GRACE_S,
                subdomain=self.job_name,
            ),
            claims=[DATA, RUNS],
            needs=[config, meeting],
            indexes=args.training.nodes,
            max_restarts=args.training.max_restarts,
        )
        self.register_outputs({"job_name": self.job_name})

    def _rendezvous(self, name: str, scope: Scope) -> core.Service:
        """Names `<job>-<index>.<job>`, resolvable before a pod is ready: ranks look for one another while they start."""
        return core.Service(
            f"{name}-rendezvous",
            metadata=scope.meta(self.job_name, component="train", annotations=SKIP_AWAIT),
            spec=core.ServiceSpecArgs(
                cluster_ip="None",
                publish_not_ready_addresses=True,
                selector=selector("train", self.job_name),
                ports=[core.ServicePortArgs(name="rdzv", port=RENDEZVOUS_PORT, target_port="rdzv")],
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )

    def _launch(self, args: TrainingJobArgs) -> core.ContainerArgs:
        training, pipeline = args.training, args.pipeline
        launcher = [
            "python",
            "-m",
            "trainer.launch",
            f"--nnodes={training.nodes}",
            f"--nproc-per-node={args.ranks_per_node}",
        ]
        launcher += [f"--max-restarts={training.max_restarts}", "--rdzv-backend=c10d"]
        launcher += ["--rdzv-endpoint=$(RDZV_ENDPOINT)", f"--rdzv-id={self.job_name}", "--"]
        program = ["--config", "/config/train.yaml", f"data={pipeline.dataset}", f"run={pipeline.run}"]
        shm = core.VolumeMountArgs(name="shm", mount_path="/dev/shm")  # noqa: S108
        places = [place.mount for place in pipeline.train_places]
        launch = container(
            name="train",
            image=args.image.reference,
            command=[*launcher, *program, *pipeline.train_words],
            resources=resources(args.resources, gpus=args.gpus, gpu_resource=args.scope.gpu_resource),
            mounts=[CONFIG_MOUNT, DATA.mount, RUNS.mount, shm, *places],
            ports={"rdzv": RENDEZVOUS_PORT, "metrics": METRICS_PORT},
            variables=env(
                METRICS_HOST="0.0.0.0",  # noqa: S104 - Prometheus scrapes it; a NetworkPolicy says who may
                RDZV_ENDPOINT=f"{self.job_name}-0.{self.job_name}:{RENDEZVOUS_PORT}",
                # The pod's CPUs are shared out among its ranks.
                OMP_NUM_THREADS=str(max(1, int(args.resources.cpus / args.ranks_per_node))),
            ),
        )
        if training.secret:
            launch.env_from = [core.EnvFromSourceArgs(secret_ref=core.SecretEnvSourceArgs(name=training.secret))]
        return launch


def _shared_memory(of: PodResources) -> core.VolumeArgs:
    """`/dev/shm` of a quarter of the pod's memory: NCCL and data loaders need more than the 64 MiB that a pod gets."""
    size = memory_quantity(min(of.memory_gib / 4, SHM_MOST_GIB))
    return core.VolumeArgs(name="shm", empty_dir=core.EmptyDirVolumeSourceArgs(medium="Memory", size_limit=size))


def _same_zone(job: str) -> core.AffinityArgs:
    """The gang in one zone where there is room: gradients cross zones slowly, and at a price."""
    near = core.PodAffinityTermArgs(
        topology_key="topology.kubernetes.io/zone",
        label_selector=LabelSelectorArgs(match_labels=selector("train", job)),
    )
    preferred = core.WeightedPodAffinityTermArgs(weight=100, pod_affinity_term=near)
    return core.AffinityArgs(
        pod_affinity=core.PodAffinityArgs(preferred_during_scheduling_ignored_during_execution=[preferred])
    )
