"""docs/training.md shows nothing that a stack file may not say: every block of it is loaded as it stands."""

import re
from pathlib import Path

import pytest
import yaml

from infra.spec import load

ROOT = Path(__file__).parents[3]
BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)
EXAMPLES = [part for block in BLOCKS for part in block.split("---\n")]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_part_of_a_stack_that_loads(example: str, tmp_path: Path) -> None:
    stack = yaml.safe_load((ROOT / "stacks" / "Pulumi.dev.yaml").read_text())
    training, said = stack["config"]["slipway:training"], yaml.safe_load(example)
    if "base" in said:
        del training["model"]
    training |= said
    file = tmp_path / "Pulumi.dev.yaml"
    file.write_text(yaml.safe_dump(stack))
    assert load(file).training
