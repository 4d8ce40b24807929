"""bfloat16 is chosen by itself where the processor computes in it, and by a word where it does not."""

import pytest
import torch

import trainer.step
from trainer.step import computes_in_bfloat16, cpu_has_bfloat16, precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("native", [False, True])
def test_auto_follows_the_processor_and_words_are_obeyed(monkeypatch, native):
    monkeypatch.setattr(trainer.step, "cpu_has_bfloat16", lambda: native)
    assert computes_in_bfloat16("auto", CPU) is native
    assert computes_in_bfloat16("bfloat16", CPU)
    assert not computes_in_bfloat16("float32", CPU)
    with precision("auto", CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize(
    ("level", "bf16", "amx", "native"),
    [
        ("AVX512", True, False, True),
        ("AVX512", False, True, True),
        ("AVX512", False, False, False),
        ("AVX2", True, True, False),  # torch would emulate it there
    ],
)
def test_a_processor_has_it_by_avx512_bf16_or_amx(monkeypatch, level, bf16, amx, native):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    cpu_has_bfloat16.cache_clear()
    try:
        assert cpu_has_bfloat16() is native
    finally:
        cpu_has_bfloat16.cache_clear()
