"""The shipped stacks, rendered once a session, and stacks made from small changes to them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from infra.render import Rendered, run

STACKS = Path(__file__).parents[3] / "stacks"
NAMES = ("local", "dev", "staging", "prod")
Json = dict[str, Any]


@cache
def shipped(name: str) -> Rendered:
    return run(STACKS / f"Pulumi.{name}.yaml")


class Objects:
    """Manifests of a render, with the questions that tests ask."""

    def __init__(self, rendered: Rendered) -> None:
        self.rendered = rendered
        self.all = rendered.manifests

    def kind(self, kind: str) -> list[Json]:
        return [manifest for manifest in self.all if manifest["kind"] == kind]

    def one(self, kind: str, name: str) -> Json:
        """The object whose name is `name`, or begins with it and a dash."""
        found = [m for m in self.kind(kind) if m["metadata"]["name"] == name]
        found = found or [m for m in self.kind(kind) if m["metadata"]["name"].startswith(f"{name}-")]
        assert len(found) == 1, f"{len(found)} of {kind}/{name}"
        return found[0]

    def pods(self) -> list[Json]:
        """Every pod template."""
        return [m["spec"]["template"] for kind in ("Job", "Deployment") for m in self.kind(kind)]

    def containers(self) -> list[Json]:
        return [c for pod in self.pods() for c in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]]

    def names(self, kind: str) -> set[str]:
        return {manifest["metadata"]["name"] for manifest in self.kind(kind)}


@pytest.fixture(params=NAMES)
def stack(request: pytest.FixtureRequest) -> Objects:
    """Each shipped stack in turn."""
    return Objects(shipped(request.param))


@pytest.fixture
def prod() -> Objects:
    return Objects(shipped("prod"))


@pytest.fixture
def local() -> Objects:
    return Objects(shipped("local"))


@pytest.fixture
def rendered(changed: Callable[..., Path]) -> Callable[..., Objects]:
    """`rendered("prod", {"training.steps": 7})`: a shipped stack with some values changed."""
    return lambda name, values: Objects(run(changed(name, values)))
