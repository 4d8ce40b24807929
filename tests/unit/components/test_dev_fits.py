"""The unmodified `dev` stack fits the smallest cluster that it is for: a node of two CPUs, with what a cluster itself runs there."""

from pathlib import Path
from typing import Any

import yaml

from infra.clouds import local

from .conftest import Objects, shipped

Json = dict[str, Any]
NODE_CPUS = 2.0
ADD_ONS = ("coredns", "metrics-server")


def cpus(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def pod_cpus(spec: Json) -> float:
    """What the scheduler asks of a node for a pod: init containers run one after another, and before the others."""

    def of(kind: str) -> list[float]:
        return [cpus(one["resources"].get("requests", {}).get("cpu", "0")) for one in spec.get(kind, [])]

    return max([sum(of("containers")), *of("initContainers")])


def pods_at_once(workload: Json) -> int:
    """Of a Job all its indexes; of a Deployment its replicas, or the least that its autoscaler has."""
    return int(workload["spec"].get("completions") or workload["spec"].get("replicas") or 1)


def test_all_of_its_pods_are_scheduled_at_once_and_a_second_server() -> None:
    dev = Objects(shipped("dev"))
    workloads = [*dev.kind("Job"), *dev.kind("Deployment")]
    assert {one["metadata"]["name"].split("-")[0] for one in workloads} == {
        "chat",
        "data",
        "promote",
        "router",
        "train",
    }
    stack = sum(pods_at_once(one) * pod_cpus(one["spec"]["template"]["spec"]) for one in workloads)
    scaled_up = pod_cpus(dev.one("Deployment", "chat")["spec"]["template"]["spec"])
    assert stack + scaled_up + add_on_cpus() <= NODE_CPUS


def add_on_cpus() -> float:
    """Of the local cluster's own pods, which are those of other small clusters."""
    folder = Path(local.__file__).parent / "addons"
    documents = [one for name in ADD_ONS for one in yaml.safe_load_all((folder / f"{name}.yaml").read_text()) if one]
    return sum(pod_cpus(one["spec"]["template"]["spec"]) for one in documents if one["kind"] == "Deployment")
