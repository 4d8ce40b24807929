"""A small real dataset and config that the trainer's tests share."""

from pathlib import Path

import pytest
import torch
import yaml
from programs_of_trainer import REPOSITORY, TRAIN

from trainer.data import DataConfig, make_dataset
from trainer.log import Log


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Forty short documents of the trainer's own source."""
    directory = tmp_path_factory.mktemp("corpus")
    text = "".join(path.read_text() for path in sorted((REPOSITORY / "trainer").glob("**/*.py")))
    size = len(text) // 40
    for index in range(40):
        (directory / f"part-{index:02d}.txt").write_text(text[index * size : (index + 1) * size])
    return directory


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, corpus) -> Path:
    out = tmp_path_factory.mktemp("data") / "dataset"
    config = DataConfig.model_validate(
        {"source": {"kind": "text", "path": str(corpus)}, "vocab_size": 300, "held_out": 0.1, "seed": 1}
    )
    make_dataset(config, out, log=Log(rank=1))
    return out


@pytest.fixture
def train_yaml(tmp_path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(TRAIN))
    return path
