"""The training run: an Indexed Job of one pod a node, and the headless Service by which its ranks meet. Launches that train apart
(`local_sgd.launches`) are Jobs of their own, which meet at a `MeetingPlace`.

Each pod waits for the dataset in an init container, which holds the pod's GPUs: the gang's nodes are being made during that
time, and pods that came later could find them taken. The price is idle GPUs for as long as the data takes, once for a dataset.
Kubernetes starts the pods of a Job one by one: a gang that fits its pool, which the checks hold, always comes together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pulumi
from pulumi_kubernetes.core import v1 as core
from pulumi_kubernetes.meta.v1 import LabelSelectorArgs

from infra.clouds import Placement
from infra.components.common import SKIP_AWAIT, Scope, env, memory_quantity, resources, selector
from infra.components.meeting import MeetingPlace, MeetingPlaceArgs
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
    meeting_placement: Placement
    """Of the place where `local_sgd.launches` meet, which needs no GPU."""
    ranks_per_node: int
    gpus: int
    """GPUs of one pod; 0 to train on CPUs."""


class TrainingJob(pulumi.ComponentResource):
    job_names: tuple[str, ...]
    """Its Jobs: one, or one for each of `local_sgd.launches`."""

    def __init__(self, name: str, args: TrainingJobArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("slipway:index:TrainingJob", name, None, opts)
        whole = f"{args.training.name}-{args.pipeline.train_digest}"
        launches = range(args.training.launches)
        if len(launches) == 1:
            self.job_names = (f"train-{whole}",)
            self._declare(name, self.job_names[0], args)
        else:
            self.job_names = tuple(f"train-{whole}-{launch}" for launch in launches)
            meeting = self._meet(f"{name}-meeting", f"meet-{whole}", args)
            for launch, job_name in enumerate(self.job_names):
                joins = env(REPLICA=str(launch), MEETING_ENDPOINT=meeting.endpoint)
                self._declare(f"{name}-{launch}", job_name, args, launch=launch, variables=joins)
        self.register_outputs({"job_names": list(self.job_names)})

    def _meet(self, name: str, object_name: str, args: TrainingJobArgs) -> MeetingPlace:
        place = MeetingPlaceArgs(
            scope=args.scope,
            name=object_name,
            image=args.image,
            placement=args.meeting_placement,
            launches=args.training.launches,
            nodes_of_launch=args.training.nodes_of_launch,
        )
        return MeetingPlace(name, place, pulumi.ResourceOptions(parent=self))

    def _declare(
        self,
        name: str,
        job_name: str,
        args: TrainingJobArgs,
        *,
        launch: int = 0,
        variables: Sequence[core.EnvVarArgs] = (),
    ) -> None:
        """One gang: its config, the name that its ranks meet at, its Job."""
        files, nodes = {"train.yaml": args.pipeline.train}, args.training.nodes_of_launch
        config = declare_config(self, name, object_name=job_name, component="train", scope=args.scope, files=files)
        wait = resources(WAIT, gpu_resource=args.scope.gpu_resource)
        declare_job(
            self,
            f"{name}-job",
            object_name=job_name,
            scope=args.scope,
            image=args.image,
            pod=PodArgs(
                component="train",
                instance=job_name,
                placement=args.placement,
                affinity=_same_zone(job_name) if nodes > 1 else None,
                init_containers=[wait_for(args.image, f"{args.pipeline.dataset}/manifest.json", wait, [DATA])],
                containers=[_launch(job_name, args, words=args.pipeline.words_of(launch), variables=variables)],
                volumes=[_shared_memory(args.resources), *(place.volume for place in args.pipeline.train_places)],
                # Karpenter leaves the node alone until the pod is done; a spot interruption comes all the same.
                annotations={"karpenter.sh/do-not-disrupt": "true"},
                grace_s=GRACE_S,
                subdomain=job_name,
            ),
            claims=[DATA, RUNS],
            needs=[config, self._rendezvous(name, job_name, args.scope)],
            indexes=nodes,
            max_restarts=args.training.max_restarts,
        )

    def _rendezvous(self, name: str, job_name: str, scope: Scope) -> core.Service:
        """Names `<job>-<index>.<job>`, resolvable before a pod is ready: ranks look for one another while they start."""
        return core.Service(
            f"{name}-rendezvous",
            metadata=scope.meta(job_name, component="train", annotations=SKIP_AWAIT),
            spec=core.ServiceSpecArgs(
                cluster_ip="None",
                publish_not_ready_addresses=True,
                selector=selector("train", job_name),
                ports=[core.ServicePortArgs(name="rdzv", port=RENDEZVOUS_PORT, target_port="rdzv")],
            ),
            opts=pulumi.ResourceOptions(parent=self),
        )


def _launch(
    job_name: str, args: TrainingJobArgs, *, words: Sequence[str], variables: Sequence[core.EnvVarArgs]
) -> core.ContainerArgs:
    training = args.training
    launcher = [
        "python",
        "-m",
        "trainer.launch",
        f"--nnodes={training.nodes_of_launch}",
        f"--nproc-per-node={args.ranks_per_node}",
    ]
    launcher += [f"--max-restarts={training.max_restarts}", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=$(RDZV_ENDPOINT)", f"--rdzv-id={job_name}", "--"]
    shm = core.VolumeMountArgs(name="shm", mount_path="/dev/shm")  # noqa: S108
    places = [place.mount for place in args.pipeline.train_places]
    launch = container(
        name="train",
        image=args.image.reference,
        command=[*launcher, "--config", "/config/train.yaml", *words],
        resources=resources(args.resources, gpus=args.gpus, gpu_resource=args.scope.gpu_resource),
        mounts=[CONFIG_MOUNT, DATA.mount, RUNS.mount, shm, *places],
        ports={"rdzv": RENDEZVOUS_PORT, "metrics": METRICS_PORT},
        variables=[
            *env(
                METRICS_HOST="0.0.0.0",  # noqa: S104 - Prometheus scrapes it; a NetworkPolicy says who may
                RDZV_ENDPOINT=f"{job_name}-0.{job_name}:{RENDEZVOUS_PORT}",
                # The pod's CPUs are shared out among its ranks.
                OMP_NUM_THREADS=str(max(1, int(args.resources.cpus / args.ranks_per_node))),
            ),
            *variables,
        ],
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
