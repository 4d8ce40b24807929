"""Questions to Kubernetes objects as plain values. What is missing, null or of another form is empty: others wrote it.

Nothing is read that is not asked for: a policy hands in objects whose unknown values raise when they are touched.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

Json = Mapping[str, Any]
GPU_RESOURCES = ("nvidia.com/", "amd.com/gpu", "gpu.intel.com/", "google.com/tpu", "aws.amazon.com/neuron")
POD_KINDS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")


def part(value: Json, *keys: str) -> Json:
    """The mapping at `keys`."""
    inner: Any = value
    for key in keys:
        inner = cast(Json, inner).get(key) if isinstance(inner, Mapping) else None
    return cast(Json, inner) if isinstance(inner, Mapping) else {}


def parts(value: Json, key: str) -> list[Json]:
    """The mappings in the list at `key`."""
    inner: Any = value.get(key)
    if not isinstance(inner, Sequence) or isinstance(inner, str):
        return []
    return [cast(Json, item) for item in cast(Sequence[Any], inner) if isinstance(item, Mapping)]


def whole(value: Any, default: int) -> int:
    """A whole number, which Pulumi carries as a float and YAML may as a text."""
    try:
        return int(float(value))
    except (TypeError, ValueError):
        return default


def kind_of(manifest: Json) -> str:
    return str(manifest.get("kind"))


def namespace_of(manifest: Json) -> str:
    return str(part(manifest, "metadata").get("namespace") or "default")


def name_of(manifest: Json) -> str:
    """`Deployment/prod/chat`; without a namespace, `Namespace/prod`."""
    metadata = part(manifest, "metadata")
    name = metadata.get("name") or metadata.get("generateName") or "?"
    return "/".join(str(word) for word in (kind_of(manifest), metadata.get("namespace"), name) if word)


def pod_template(manifest: Json) -> Json:
    """Metadata and spec of the pods that an object makes; empty for what makes none."""
    if kind_of(manifest) == "Pod":
        return manifest
    if kind_of(manifest) == "CronJob":
        return part(manifest, "spec", "jobTemplate", "spec", "template")
    return part(manifest, "spec", "template") if kind_of(manifest) in POD_KINDS else {}


def pod_spec(manifest: Json) -> Json:
    return part(pod_template(manifest), "spec")


def pod_labels(manifest: Json) -> Json:
    return part(pod_template(manifest), "metadata", "labels")


def containers(manifest: Json) -> list[Json]:
    """All containers of the pods that an object makes, init containers first."""
    spec = pod_spec(manifest)
    return [*parts(spec, "initContainers"), *parts(spec, "containers")]


def gpus_of(manifest: Json) -> int:
    """GPUs of one pod, by limits or, where those are missing, by requests."""
    amounts = [{**part(c, "resources", "requests"), **part(c, "resources", "limits")} for c in containers(manifest)]
    return sum(whole(amount, 0) for each in amounts for name, amount in each.items() if is_gpu(name))


def is_gpu(resource: str) -> bool:
    return resource.startswith(GPU_RESOURCES)
