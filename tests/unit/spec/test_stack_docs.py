"""docs/training.md and docs/serving.md show nothing that a stack file may not say: every block of them is loaded as it stands."""

import re
from pathlib import Path

import pytest
import yaml

from infra.spec import Stack, load

ROOT = Path(__file__).parents[3]


def examples(page: str) -> list[str]:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    return [part for block in blocks for part in block.split("---\n")]


def loaded(stack: dict, folder: Path) -> Stack:
    file = folder / "Pulumi.dev.yaml"
    file.write_text(yaml.safe_dump(stack))
    return load(file)


def test_there_are_examples() -> None:
    assert min(len(examples(page)) for page in ("training.md", "serving.md")) >= 8


@pytest.mark.parametrize("example", examples("training.md"))
def test_an_example_of_training_is_part_of_a_stack_that_loads(example: str, tmp_path: Path) -> None:
    stack = yaml.safe_load((ROOT / "stacks" / "Pulumi.dev.yaml").read_text())
    training, said = stack["config"]["slipway:training"], yaml.safe_load(example)
    if "base" in said:
        del training["model"]
    training |= said
    assert loaded(stack, tmp_path).training


@pytest.mark.parametrize("example", examples("serving.md"))
def test_an_example_of_serving_is_part_of_a_stack_that_loads(example: str, tmp_path: Path) -> None:
    stack = yaml.safe_load((ROOT / "stacks" / "Pulumi.prod.yaml").read_text())
    stack["config"] |= {f"slipway:{section}": said for section, said in yaml.safe_load(example).items()}
    assert loaded(stack, tmp_path).services
