"""Images hold no shell, and nothing but /tmp and mounts can be written: what every pod of every shipped stack is held to."""

from typing import Any

import pytest

from .conftest import Objects

SHELLS = {"sh", "bash", "dash", "ash", "busybox", "env"}
PROGRAMS = {"python", "envoy", "/pause"}
"""What images of ours, and Kubernetes' own of a pause, hold to start a container with."""
HOOKS = ("livenessProbe", "readinessProbe", "startupProbe")
Json = dict[str, Any]


def commands(container: Json) -> list[list[str]]:
    """Everything that the node would run in the container."""
    handlers = [container.get(hook, {}) for hook in HOOKS]
    handlers += container.get("lifecycle", {}).values()
    executed = [handler["exec"]["command"] for handler in handlers if "exec" in handler]
    return [[*container.get("command", []), *container.get("args", [])], *executed]


def test_no_container_needs_a_shell(stack: Objects) -> None:
    containers = stack.containers()
    assert containers
    for container in containers:
        for command in commands(container):
            assert command[0] in PROGRAMS, container["name"]
            assert not [word for word in command if word.rsplit("/", 1)[-1] in SHELLS], container["name"]


def test_nobody_writes_the_root_and_everybody_has_scratch_space(stack: Objects) -> None:
    for pod in stack.pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        scratch = {volume["name"] for volume in spec["volumes"] if "emptyDir" in volume}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            mounted = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in scratch}
            home = next(one["value"] for one in container["env"] if one["name"] == "HOME")
            assert {"/tmp", home} <= mounted


@pytest.mark.parametrize("hook", [*HOOKS, "lifecycle"])
def test_a_shell_would_be_found(local: Objects, hook: str) -> None:
    shell: Json = {"exec": {"command": ["/bin/sh", "-c", "true"]}}
    container = local.containers()[0] | {hook: {"preStop": shell} if hook == "lifecycle" else shell}
    assert ["/bin/sh", "-c", "true"] in commands(container)
