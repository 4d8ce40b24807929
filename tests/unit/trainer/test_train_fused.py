"""What a CPU computes by kernels, in pieces or compiled is what the plain operations say, gradients too."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts_of_trainer import BASE, VOCAB, config_of, cursor_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import trainer.kernels.decoder
import trainer.loss
from trainer.config import ModelConfig
from trainer.errors import StopSignal
from trainer.kernels.decoder import usable, why_not
from trainer.loss import IGNORED, cross_entropy
from trainer.model import Decoder
from trainer.optim import make_optimizer
from trainer.parallel import Ranks, lay_out
from trainer.parallel.memory import apply_recompute, plain_name
from trainer.step import train_step


def decoder_of(**shape) -> Decoder:
    torch.manual_seed(0)
    shape = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "max_context": 64, **shape}
    model = Decoder(ModelConfig.model_validate(shape), vocab_size=70)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=1.7 / shape["hidden"] ** 0.5)
    return model


def loss_and_gradients(model: Decoder, tokens: torch.Tensor, **more) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(tokens, tokens.roll(-1, 1), **more)
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


needs_kernels = pytest.mark.skipif(why_not() is not None, reason=f"the kernels are not to be had here: {why_not()}")

SHAPES = {
    "grouped": {},
    "untied": {"kv_heads": 4, "tied_embeddings": False},
    "odd head width": {"hidden": 48, "kv_heads": 1, "head_dim": 12},
    "wide": {"layers": 1, "hidden": 528, "kv_heads": 4, "ffn": 544},
    "norms of queries and keys": {"family": "qwen3", "head_dim": 16},
}


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer.kernels.decoder, "usable", lambda *_: False)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [2, 61])
def test_kernels_give_what_the_plain_operations_do(monkeypatch, shape, length):
    model, tokens = decoder_of(**shape), torch.randint(0, 70, (3, length))
    documents = torch.arange(length).div(15, rounding_mode="floor").expand(3, length)
    for more in ({}, {"documents_BL": documents}):
        with monkeypatch.context() as patched:
            without_kernels(patched)
            plain = loss_and_gradients(model, tokens, **more)
        found = loss_and_gradients(model, tokens, **more)
        assert plain.keys() == found.keys()
        for name, value in plain.items():
            assert torch.linalg.vector_norm(found[name] - value) <= 2e-5 * torch.linalg.vector_norm(value), name


@needs_kernels
def test_gradients_may_come_in_any_order_of_memory():
    model, x = decoder_of().model, torch.randn(2, 20, 32)
    turned = torch.randn(20, 2, 32).transpose(0, 1)
    found = []
    for grad in (turned, turned.contiguous()):
        inputs = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        y = model.layers[0](inputs, model.cos_LW, model.sin_LW)
        found.append(torch.autograd.grad(y, [inputs, *model.layers[0].parameters()], grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_kernels
def test_the_number_of_threads_changes_no_bit():
    model, tokens = decoder_of(), torch.randint(0, 70, (3, 61))
    one = loss_and_gradients(model, tokens)
    try:
        torch.set_num_threads(3)
        three = loss_and_gradients(model, tokens)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one[name], three[name]) for name in one)


@needs_kernels
def test_frozen_matrices_get_no_gradient_and_what_is_below_them_does():
    model, tokens = decoder_of(), torch.randint(0, 70, (2, 20))
    wanted = loss_and_gradients(model, tokens)
    for name, parameter in model.model.layers.named_parameters():
        parameter.requires_grad_("norm" in name)
    found = loss_and_gradients(model, tokens)
    assert not any("proj" in name for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_made_again_is_what_was_made(monkeypatch, mode):
    if mode == "selective":  # it watches each operation
        without_kernels(monkeypatch)
    model, tokens = decoder_of(), torch.randint(0, 70, (3, 40))
    kept = loss_and_gradients(model, tokens)
    apply_recompute(model, mode)
    again = {plain_name(name): value for name, value in loss_and_gradients(model, tokens).items()}
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@needs_kernels
def test_kernels_are_for_plain_matrices_in_float32():
    plain, biased, adapted = nn.Linear(16, 4, bias=False), nn.Linear(16, 4), nn.Linear(16, 4, bias=False)
    adapted.__class__ = type("Adapted", (nn.Linear,), {})
    x = torch.zeros(1, 2, 16)
    assert usable(x, plain, plain)
    assert not usable(x, plain, biased)
    assert not usable(x, plain, adapted)
    assert not usable(x, plain, nn.Linear(12, 4, bias=False))
    assert not usable(x.bfloat16(), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert not usable(x, plain)
    with Largest():
        assert not usable(x, plain)


@needs_kernels
def test_a_loss_that_is_not_a_number_is_told_as_that():
    model, tokens = decoder_of(), torch.randint(0, 70, (2, 20))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    assert model(tokens, tokens).isnan()


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


class OtherLinear(nn.Linear):
    """Like one with an adapter, whose product is its own affair."""


@needs_kernels
@given(rows=st.integers(1, 200), ignored=st.sets(st.integers(0, 99)), outputs=st.integers(2, 70))
@settings(max_examples=25, deadline=None)
def test_the_loss_of_kernels_is_that_of_all_logits_at_once(rows, ignored, outputs):
    torch.manual_seed(0)
    head, x, targets = nn.Linear(16, outputs, bias=False), torch.randn(1, 100, 16), torch.randint(0, outputs, (1, 100))
    targets[0, sorted(ignored)] = IGNORED
    x.mul_(4).requires_grad_()
    whole = F.cross_entropy(head(x)[0], targets[0], reduction="sum")
    wanted = torch.autograd.grad(whole, [x, head.weight])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer.loss, "LOGITS_AT_ONCE", {"cpu": rows * outputs})
        loss = cross_entropy(head, x, targets, reduction="sum")
        found = torch.autograd.grad(loss, [x, head.weight])
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.Linear, OtherLinear])
@given(rows=st.integers(1, 40), ignored=st.sets(st.integers(0, 23)), reduction=st.sampled_from(["sum", "mean"]))
@settings(max_examples=25, deadline=None)
def test_the_loss_is_that_of_all_logits_at_once_and_never_holds_them(kind, rows, ignored, reduction):
    torch.manual_seed(0)
    head, x, targets = kind(8, 50, bias=False), torch.randn(2, 12, 8, requires_grad=True), torch.randint(0, 50, (2, 12))
    targets.view(-1)[sorted(ignored)] = IGNORED
    if len(ignored) == 24 and reduction == "mean":
        return  # a mean of nothing
    whole = F.cross_entropy(head(x).flatten(0, 1), targets.flatten(), reduction=reduction)
    wanted = torch.autograd.grad(whole, [x, head.weight])
    with pytest.MonkeyPatch.context() as patched, Largest() as largest:
        patched.setattr(trainer.loss, "LOGITS_AT_ONCE", {"cpu": rows * 50})
        loss = cross_entropy(head, x, targets, reduction=reduction)
        found = torch.autograd.grad(loss, [x, head.weight])
    assert largest.numbers <= max(rows * 50, head.weight.numel())
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradients_of_bfloat16_weights_are_added_up_in_float32(monkeypatch):
    monkeypatch.setattr(trainer.loss, "LOGITS_AT_ONCE", {"cpu": 50})
    torch.manual_seed(0)
    head, x, targets = nn.Linear(8, 50, bias=False), torch.randn(1, 400, 8), torch.randint(0, 50, (1, 400))
    cross_entropy(head, x, targets, reduction="mean").backward()
    wanted, low = head.weight.grad, nn.Linear(8, 50, bias=False, dtype=torch.bfloat16)
    low.weight.data.copy_(head.weight.data)
    cross_entropy(low, x.bfloat16(), targets, reduction="mean").backward()
    assert low.weight.grad.dtype == torch.bfloat16
    assert torch.linalg.vector_norm(low.weight.grad.float() - wanted) <= 2e-2 * torch.linalg.vector_norm(wanted)


def test_a_frozen_head_gets_no_gradient_and_what_is_below_it_does():
    head, x = nn.Linear(8, 50, bias=False).requires_grad_(False), torch.randn(1, 6, 8, requires_grad=True)
    cross_entropy(head, x, torch.randint(0, 50, (1, 6)), reduction="mean").backward()
    assert head.weight.grad is None
    assert x.grad is not None
    with torch.inference_mode():
        assert cross_entropy(head, x, torch.randint(0, 50, (1, 6)), reduction="mean").isfinite()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_train_as_plain_ones(tmp_path):
    curves = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = {**BASE["model"], "layers": 1}
        config = config_of({"model": model, "parallelism": {"compile": compiled}, "micro_batch": 16})
        ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))
        laid = lay_out(config, vocab_size=VOCAB, ranks=ranks, low_precision=False)
        optimizer, cursor = make_optimizer(laid.module, config.optim), cursor_of(tmp_path, config)
        step = {"model": laid.run, "optimizer": optimizer, "cursor": cursor, "ranks": ranks, "stop": StopSignal()}
        curves.append([train_step(number, config, lr=1e-2, **step)[:2] for number in range(3)])
        names = {name for name, _ in laid.parts[0].named_parameters()}
        assert not any("_orig_mod" in name for name in names)
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-4, atol=1e-5)
