"""What the unit tests of infra share: the repository's own stack files, and changed copies of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.spec import Stack, load

ROOT = Path(__file__).parents[2]
STACKS = ("local", "dev", "staging", "prod")


@pytest.fixture(params=STACKS)
def stack_path(request: pytest.FixtureRequest) -> Path:
    """Each stack file of the repository in turn."""
    return ROOT / "stacks" / f"Pulumi.{request.param}.yaml"


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """`changed("prod", {"training.steps": 5})`: a copy of a stack file with values set by dotted path; numbers index lists."""

    def change(stack: str, values: dict[str, Any]) -> Path:
        document = yaml.safe_load((ROOT / "stacks" / f"Pulumi.{stack}.yaml").read_text())
        for path, value in values.items():
            first, *rest = path.split(".")
            keys: list[str | int] = ["slipway:" + first, *(int(k) if k.isdigit() else k for k in rest)]
            node = document["config"]
            for key in keys[:-1]:
                node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
            node[keys[-1]] = value
        file = tmp_path / f"Pulumi.{stack}.yaml"
        file.write_text(yaml.safe_dump(document))
        return file

    return change


@pytest.fixture
def variant(changed: Callable[..., Path]) -> Callable[..., Stack]:
    """The same, parsed."""
    return lambda stack, values: load(changed(stack, values))
