"""A layout that cannot work is refused at once, with the numbers and with what would."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs_of_trainer import TRAIN

from trainer.config import TrainConfig
from trainer.errors import Refused
from trainer.layout import fit_dataset, layout_of


def config_of(parallelism: dict, **more) -> TrainConfig:
    model = {**TRAIN["model"], "tied_embeddings": False, **more.pop("model", {})}
    return TrainConfig.model_validate({**TRAIN, "model": model, "parallelism": parallelism, **more})


@pytest.mark.parametrize(
    ("parallelism", "world", "more", "said"),
    [
        ({"tp": 3}, 4, {}, r"tp 3 does not make up the world of 4 ranks .*Start 3 ranks"),
        ({"dp_shard": 2, "dp_replicate": 3}, 4, {}, r"dp_replicate 3 does not make up the world of 4 .*Start 6 ranks"),
        ({"tp": 4}, 4, {}, r"model.kv_heads 2 does not divide by tp 4 .*Set tp to 2"),
        ({"tp": 2}, 2, {"model": {"ffn": 33}}, r"model.ffn 33 does not divide by tp 2 .*Set tp to 1"),
        ({"cp": 2}, 2, {"seq": 30}, r"seq 30 does not divide into the 4 pieces of cp 2 .*Set seq to 28"),
        ({"pp": 4}, 4, {}, r"2 layers are too few for 4 stages .*Set pp to at most 2"),
        ({"pp": 2}, 2, {"micro_batch": 4}, r"needs at least 2 micro-batches a step and has 1 .*grad_accum is 2"),
        ({}, 3, {}, r"global_batch 4 does not divide by micro_batch 2 x 3 ranks"),
        ({}, 1, {"local_sgd": {"every_steps": 5}}, r"local_sgd has 1 replica to average"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(parallelism, world, more, said):
    with pytest.raises(Refused, match=said):
        layout_of(config_of(parallelism, **more), world=world)


def test_a_dataset_that_tensor_ranks_cannot_share_is_refused():
    with pytest.raises(Refused, match=r"vocabulary of 301 does not divide by tp 2 .*vocab_size 302"):
        fit_dataset(config_of({"tp": 2}), vocab_size=301)


@given(
    sizes=st.fixed_dictionaries({name: st.integers(1, 4) for name in ("dp_shard", "cp", "tp", "pp")}),
    world=st.integers(1, 64),
)
@settings(max_examples=200, deadline=None)
def test_a_layout_that_is_taken_makes_up_the_world_and_shares_everything_evenly(sizes, world):
    config = config_of(sizes, global_batch=48, micro_batch=1)
    try:
        layout = layout_of(config, world=world)
    except Refused:
        return
    assert layout.world == world
    assert config.model.kv_heads % layout.tp == 0
    assert config.seq % (layout.cp * layout.tp) == 0
    assert config.grad_accum(layout.dp) * layout.dp == 48
    assert layout.pp <= config.model.layers
