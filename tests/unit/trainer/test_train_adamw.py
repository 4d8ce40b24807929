"""An AdamW step of the kernels is torch's with gradients scaled beforehand, whatever the sizes, and its state is torch's too."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trainer.kernels.adamw as kernels
from trainer.config import OptimConfig
from trainer.optim import make_optimizer, step_by

needs_kernels = pytest.mark.skipif(not kernels.usable([]), reason="the kernels are not to be had here")


def model_of(*shapes: tuple[int, ...]) -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])


def give_gradients(model: nn.ParameterList, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def stepped(model: nn.ParameterList, *, steps: int, factor: float, with_kernels: bool) -> torch.optim.AdamW:
    """The optimizer after some steps, the first of which are torch's."""
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.2))
    with pytest.MonkeyPatch.context() as patched:
        if not with_kernels:
            patched.setattr(kernels, "usable", lambda _: False)
        for step in range(steps):
            give_gradients(model, step)
            step_by(optimizer, factor)
    return optimizer


sizes = st.lists(
    st.tuples(st.integers(1, 40)) | st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=5
)


@needs_kernels
@given(shapes=sizes, factor=st.floats(1e-3, 2.0))
@settings(max_examples=25, deadline=None)
def test_a_step_is_torchs_with_scaled_gradients(shapes, factor):
    ours, theirs = model_of(*shapes), model_of(*shapes)
    states = [
        stepped(model, steps=4, factor=factor, with_kernels=with_kernels).state_dict()["state"]
        for model, with_kernels in ((ours, True), (theirs, False))
    ]
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(states[0], states[1], rtol=2e-6, atol=1e-7)


@needs_kernels
@given(shapes=sizes)
@settings(max_examples=25, deadline=None)
def test_the_norm_is_that_of_all_numbers(shapes):
    tensors = [parameter.detach() for parameter in model_of(*shapes)]
    torch.testing.assert_close(kernels.norm(tensors), torch.cat([each.flatten() for each in tensors]).norm())


@needs_kernels
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_norm_tells_of_a_number_that_is_none(wrong):
    tensors = [torch.ones(20_000), torch.ones(3)]
    tensors[0][17_000] = wrong
    assert not kernels.norm(tensors).isfinite()


@needs_kernels
def test_the_number_of_threads_changes_no_bit_of_a_step():
    found = []
    for threads in (1, 3):
        model = model_of((300, 200), (7,), (70_001,))
        try:
            torch.set_num_threads(threads)
            stepped(model, steps=3, factor=0.3, with_kernels=True)
            found.append([*model, kernels.norm(list(model))])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@needs_kernels
def test_torchs_own_step_goes_on_where_the_kernels_ended():
    model = model_of((30, 20), (7,))
    optimizer = stepped(model, steps=3, factor=1.0, with_kernels=True)
    other = copy.deepcopy(model)
    again = make_optimizer(other, OptimConfig(lr=1.0))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_own in ((model, optimizer), (other, again)):
        give_gradients(each, 3)
        step_by(its_own, 1.0) if each is model else its_own.step()
    for mine, their in zip(model, other, strict=True):
        torch.testing.assert_close(mine, their, rtol=2e-6, atol=2e-6)


def test_parameters_of_other_kinds_are_torchs():
    assert not kernels.usable([torch.zeros(3, dtype=torch.bfloat16)])
    assert not kernels.usable([torch.zeros(3, 4).t()])
    assert not kernels.usable([torch.zeros(3, device="meta")])
    model = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=torch.float64))])
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.0))
    for _ in range(2):
        model[0].grad = torch.ones(3, dtype=torch.float64)
        step_by(optimizer, 0.5)
    assert (model[0] < 1).all()
