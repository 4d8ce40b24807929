"""A GPU as it stands in an instance: its share of the node's network, and what the links between GPUs of a node give."""

from dataclasses import replace

from infra.catalog import Gpu, Instance, gpu


def gpu_on(instance: Instance) -> Gpu:
    """The GPU of `instance` with that node's network. Raises ValueError for an instance without one, or an unknown GPU."""
    if instance.gpu is None:
        raise ValueError(f"{instance.name} has no GPU")
    return replace(gpu(instance.gpu), nic_gbps=instance.network_gbps / 8 / instance.gpus)
