"""A wrong config is refused with its line and the nearest thing that works, before anything starts."""

from pathlib import Path

import pytest
import yaml
from programs_of_trainer import TRAIN

from trainer.command import load_config, read_command
from trainer.config import TrainConfig
from trainer.data import DataConfig
from trainer.errors import Refused


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_known_key(tmp_path):
    text = yaml.safe_dump(TRAIN, sort_keys=False).replace("warmup_steps", "warm_up_steps")
    line = next(n for n, row in enumerate(text.splitlines(), start=1) if "warm_up_steps" in row)
    with pytest.raises(Refused, match=rf"'optim.warm_up_steps' .*train.yaml:{line}\).*'warmup_steps'"):
        load_config(TrainConfig, write(tmp_path / "train.yaml", text), {})


def test_an_unknown_key_inside_a_tagged_union_knows_the_keys_of_its_kind(tmp_path):
    path = write(tmp_path / "data.yaml", "vocab_size: 300\nsource:\n  kind: text\n  path: x\n  globb: '*.md'\n")
    with pytest.raises(Refused, match=r"'source.globb' .*data.yaml:5\). Did you mean 'glob'"):
        load_config(DataConfig, path, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "not YAML"),
        ("- 1", "not a mapping"),
        ("seq: 1\nmodel:\n  layers: 1\n  layers: 2", r"'layers' is there twice \(.*train.yaml:4\)"),
        ("x: " + "[" * 600, "nested too deeply"),
        ("", "'model' is missing"),
        ("\xff", "not UTF-8"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, text, said):
    path = tmp_path / "train.yaml"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(Refused, match=said):
        load_config(TrainConfig, path, {})


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(Refused, match="No such file"):
        load_config(TrainConfig, tmp_path / "none.yaml", {})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"seq": "64"}, "seq 64 is longer than model.max_context 32; set seq to 32 or max_context to 64"),
        ({"model.kv_heads": "3"}, "the nearest that fit are 2 and 4"),
        ({"model.hidden": "33"}, "hidden 33 does not divide by heads 4"),
        ({"optim.min_lr": "1"}, "min_lr 1 is above lr"),
        ({"optim.warmup_steps": "13"}, "warmup_steps 13 is above steps 12: lr 0.004 would never be reached"),
        ({"optim.lr": ".nan"}, "finite"),
        ({"steps": "many"}, "'steps'.*valid integer"),
        ({"optim.lrr": "1"}, r"command line: optim.lrr\). Did you mean 'lr'"),
        ({"seq.x": "1"}, "'seq' holds no keys"),
        ({"seed": "-1"}, "'seed'.*greater than or equal to 0"),
    ],
)
def test_values_that_cannot_work_are_refused_with_what_does(train_yaml, override, said):
    with pytest.raises(Refused, match=said):
        load_config(TrainConfig, train_yaml, override)


def test_words_override_the_file_and_places_are_apart(train_yaml):
    arguments = ["--config", str(train_yaml), "optim.lr=1e-3", "data=D", "steps=30", "run=R"]
    config, places = read_command("trainer", TrainConfig, places=("data", "run"), arguments=arguments)
    assert (config.optim.lr, config.steps, places) == (1e-3, 30, {"data": "D", "run": "R"})


def test_a_missing_place_is_refused_with_the_usage(train_yaml):
    with pytest.raises(Refused, match=r"run= is missing .*python -m trainer --config FILE data=… run=…"):
        read_command("trainer", TrainConfig, places=("data", "run"), arguments=["--config", str(train_yaml), "data=D"])


def test_a_batch_that_the_ranks_cannot_share_names_the_nearest_that_they_can():
    config = TrainConfig.model_validate({**TRAIN, "global_batch": 10, "micro_batch": 3})
    with pytest.raises(Refused, match=r"Set global_batch to 6 or 12, or micro_batch to 1"):
        config.grad_accum(2)
    assert TrainConfig.model_validate({**TRAIN, "global_batch": 12, "micro_batch": 3}).grad_accum(2) == 2


def test_the_digest_of_a_run_is_of_what_decides_its_weights():
    config = TrainConfig.model_validate(TRAIN)
    same = TrainConfig.model_validate({**TRAIN, "checkpoint": {"every_steps": 1, "keep": 9}, "log_every_steps": 5})
    other = TrainConfig.model_validate({**TRAIN, "seed": 1})
    assert config.run_digest() == same.run_digest() != other.run_digest()
