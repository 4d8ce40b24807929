"""The compiled kernels compute what torch computes, and a row's result is the same to the bit whatever is beside it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.attention import KVPool
from serving.engine.attention_cpu import CpuPool
from serving.engine.messages import SamplingParams
from serving.engine.scheduler import Scheduled
from serving.engine.sequence import Sequence
from serving.kernels.cpu import FORMATS, Kernels, kernels
from serving.model.quantized import CODE_MAX, GROUP, quantize

found = kernels()
pytestmark = pytest.mark.skipif(isinstance(found, str), reason=f"no compiled kernels here: {found}")


@pytest.fixture(scope="module")
def k() -> Kernels:
    assert isinstance(found, Kernels)
    return found


def dequantized(weight: torch.Tensor, form: str) -> torch.Tensor:
    if form in CODE_MAX:
        codes, scales = quantize(weight, form)
        return codes.float() * scales.repeat_interleave(GROUP, -1)
    return weight.to(getattr(torch, form)).float()


@given(
    rows=st.integers(1, 70), outputs=st.integers(1, 90), groups=st.integers(1, 19), form=st.sampled_from(list(FORMATS))
)
@settings(deadline=None, max_examples=60)
def test_a_linear_layer_is_the_product_with_what_its_format_holds(
    k: Kernels, rows: int, outputs: int, groups: int, form: str
) -> None:
    g = torch.Generator().manual_seed(rows * outputs)
    inputs = groups * GROUP
    x, weight = torch.randn(rows, inputs, generator=g), torch.randn(outputs, inputs, generator=g)
    packed = k.pack(weight, form)
    expected = x @ dequantized(weight, form).T
    # A processor with bfloat16 products rounds x to bfloat16 too: a relative error of 2^-9 in each of the terms.
    tolerance = 2e-2 if form == "bfloat16" else 1e-5
    y = k.linear(x, packed)
    assert (y - expected).abs().max() <= tolerance * inputs**0.5
    if form not in CODE_MAX:
        ids = torch.randint(0, outputs, (5,), generator=g)
        assert torch.equal(k.rows(packed, ids), dequantized(weight, form)[ids])
    some = sorted({0, rows // 2, rows - 1})
    assert torch.equal(k.linear(x[some].contiguous(), packed), y[some])


def test_float32_that_is_bfloat16_is_kept_as_such_and_computes_the_same(k: Kernels) -> None:
    if not k.halves_are_exact:
        pytest.skip("this processor's products of bfloat16 round the other factor too")
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 320, generator=g).bfloat16().float()
    kept = k.pack(weight, "float32")
    assert kept.form == "bfloat16"
    other = weight.clone()
    other[69, 319] += 2**-12  # a value that needs more digits
    whole = k.pack(other, "float32")
    assert whole.form == "float32"
    for rows in (1, 3, 5, 40):
        x = torch.randn(rows, 320, generator=g)
        assert torch.equal(k.linear(x, kept)[:, :69], k.linear(x, whole)[:, :69])


@pytest.mark.parametrize(("form", "error"), [("int8", 0.006), ("int4", 0.11)])
def test_quantized_weights_are_within_half_a_code(form: str, error: float) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(weight, form)
    back = codes.float() * scales.repeat_interleave(GROUP, -1)
    assert (back - weight).abs().le(0.5001 * scales.repeat_interleave(GROUP, -1)).all()
    assert (back - weight).norm() / weight.norm() < error


def test_norm_and_activation_equal_torchs(k: Kernels) -> None:
    x, weight = torch.randn(100, 64) * 30, torch.randn(64)
    assert torch.allclose(k.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (64,), weight, 1e-5), rtol=1e-5)
    gate, up = x.chunk(2, -1)
    assert torch.allclose(k.silu_multiply(x), torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-6)


def batch(spans: list[tuple[int, int]], blocks: int) -> list[Scheduled]:
    """Sequences with so many tokens computed and so many to compute, in blocks scattered over the pool."""
    order = np.random.default_rng(0).permutation(blocks).tolist()
    items = []
    for computed, tokens in spans:
        seq = Sequence(0, [1] * (computed + tokens), SamplingParams(max_tokens=1), decode=lambda _: "", arrived_s=0.0)
        seq.num_computed = computed
        seq.block_table = [order.pop() for _ in range(-(-(computed + tokens) // 16))]
        items.append(Scheduled(seq, tokens))
    return items


@given(
    spans=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=5),
    group=st.sampled_from([1, 2, 3, 7]),
)
@settings(deadline=None, max_examples=40)
def test_attention_equals_torchs_for_any_mix_of_chunks(k: Kernels, spans: list[tuple[int, int]], group: int) -> None:
    shape = {"layers": 1, "num_blocks": 40, "kv_heads": 2, "head_dim": 32, "dtype": torch.float32}
    compiled = CpuPool(k, **shape)
    reference = KVPool(**shape, block_size=16, device=torch.device("cpu"))
    g = torch.Generator().manual_seed(len(spans))
    spans = sorted(spans, key=lambda span: (span[1] > 1, -span[0]))

    def qkv(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.randn(tokens, 2 * (group + 2), 32, generator=g).split((2 * group, 2, 2), dim=1)

    past = [Scheduled(item.seq, item.seq.num_computed) for item in batch(spans, 40) if item.seq.num_computed]
    for item in past:
        item.seq.num_computed = 0
        one = [item]
        parts = qkv(item.num_tokens)
        for pool in (compiled, reference):
            pool.plan(one)(0, *parts)
    now = batch(spans, 40)
    parts = qkv(sum(tokens for _, tokens in spans))
    found, expected = compiled.plan(now)(0, *parts), reference.plan(now)(0, *parts)
    assert torch.allclose(found, expected, atol=2e-6)


def test_attention_in_bfloat16_reads_what_was_rounded_once(k: Kernels) -> None:
    g = torch.Generator().manual_seed(0)
    parts = torch.randn(50, 8, 32, generator=g).split((4, 2, 2), dim=1)
    q, keys, values = parts
    rounded = (q, keys.bfloat16().float(), values.bfloat16().float())
    shape = {"layers": 1, "num_blocks": 4, "kv_heads": 2, "head_dim": 32}
    half, whole = CpuPool(k, **shape, dtype=torch.bfloat16), CpuPool(k, **shape, dtype=torch.float32)
    items = batch([(0, 50)], 4)
    assert torch.equal(half.plan(items)(0, *parts), whole.plan(items)(0, *rounded))
