"""One stage of a training as a Job: its config in an immutable ConfigMap, its name with the digest of what it makes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pulumi
import yaml
from pulumi_kubernetes.batch import v1 as batch
from pulumi_kubernetes.core import v1 as core

from infra.components.common import REPLACE, SKIP_AWAIT, Scope, read_only_config
from infra.components.pods import Claim, PodArgs, container, pod_template
from infra.spec import PodResources

CONFIG_MOUNT = core.VolumeMountArgs(name="config", mount_path="/config", read_only=True)
DATA = Claim(claim="data", mount_path="/data")
RUNS = Claim(claim="runs", mount_path="/runs")
# Waiting is a stat() every few seconds.
WAIT = PodResources(cpus=0.1, memory_gib=0.25)
REFUSED, INTERRUPTED = 2, 75


@dataclass(frozen=True, kw_only=True)
class Image:
    """A container image: the reference that pods name, and the digest of its content, which names what it makes."""

    reference: pulumi.Input[str]
    digest: str
    built_by: pulumi.Resource | None = None
    """The build that pushes it, when this program builds it."""

    @property
    def needs(self) -> list[pulumi.Resource]:
        return [self.built_by] if self.built_by else []


def declare_config(
    parent: pulumi.Resource, name: str, *, object_name: str, component: str, scope: Scope, files: Mapping[str, Any]
) -> core.ConfigMap:
    """An immutable ConfigMap of YAML files; its name must carry a digest of what they decide. What decides nothing (a layout, what
    the planner expects) may change under the same name, for which the ConfigMap is made anew."""
    return core.ConfigMap(
        f"{name}-config",
        metadata=scope.meta(object_name, component=component, annotations=REPLACE),
        data={file: yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=True) for file, value in files.items()},
        immutable=True,
        opts=pulumi.ResourceOptions(parent=parent),
    )


def wait_for(
    image: Image, path: str, resources: core.ResourceRequirementsArgs, claims: Sequence[Claim]
) -> core.ContainerArgs:
    """An init container that ends once `path` is there."""
    return container(
        name="wait",
        image=image.reference,
        command=["python", "-m", "trainer.wait", path],
        resources=resources,
        mounts=[claim.mount for claim in claims],
    )


def declare_job(
    parent: pulumi.Resource,
    name: str,
    *,
    object_name: str,
    scope: Scope,
    image: Image,
    pod: PodArgs,
    claims: Sequence[Claim],
    needs: Sequence[pulumi.Resource],
    indexes: int | None = None,
    max_restarts: int,
) -> batch.Job:
    """A Job that tries again after failures and interruptions, and gives up at once on what was refused.

    `indexes`: pods of an Indexed Job, which form a gang: one index that has used up its tries fails the Job. None: one pod.
    """
    volumes = [read_only_config(object_name), *(claim.volume for claim in claims), *pod.volumes]
    return batch.Job(
        name,
        metadata=scope.meta(object_name, component=pod.component, annotations=SKIP_AWAIT | REPLACE),
        spec=batch.JobSpecArgs(
            completions=indexes,
            parallelism=indexes,
            completion_mode=None if indexes is None else "Indexed",
            backoff_limit=max_restarts if indexes is None else None,
            backoff_limit_per_index=None if indexes is None else max_restarts,
            max_failed_indexes=None if indexes is None else 0,
            pod_failure_policy=failure_policy(),
            template=pod_template(scope, _with_volumes(pod, volumes)),
        ),
        # A name is used once: the Job of a changed pod takes the place of the one before.
        opts=pulumi.ResourceOptions(parent=parent, depends_on=[*needs, *image.needs], delete_before_replace=True),
    )


def _with_volumes(pod: PodArgs, volumes: Sequence[core.VolumeArgs]) -> PodArgs:
    return replace(pod, volumes=volumes, restart_policy="Never")


def failure_policy() -> batch.PodFailurePolicyArgs:
    """In order: an evicted or preempted pod and one that saved and left do not count; a refusal is final; the rest counts."""
    disruption = batch.PodFailurePolicyOnPodConditionsPatternArgs(type="DisruptionTarget", status="True")

    def exits(code: int) -> batch.PodFailurePolicyOnExitCodesRequirementArgs:
        return batch.PodFailurePolicyOnExitCodesRequirementArgs(operator="In", values=[code])

    return batch.PodFailurePolicyArgs(
        rules=[
            batch.PodFailurePolicyRuleArgs(action="Ignore", on_pod_conditions=[disruption]),
            batch.PodFailurePolicyRuleArgs(action="Ignore", on_exit_codes=exits(INTERRUPTED)),
            batch.PodFailurePolicyRuleArgs(action="FailJob", on_exit_codes=exits(REFUSED)),
        ]
    )
