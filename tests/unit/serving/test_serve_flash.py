"""`--attention flash`: its plans and its filled-up batches give the answers of SDPA; on CUDA the real kernel and graphs do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from serving.engine.attention import KVPool
from serving.engine.attention_flash import FLASH_BLOCK_TOKENS, FlashPool
from serving.engine.block_manager import BlockManager
from serving.engine.engine import Engine
from serving.engine.graphs import DecodeGraphs, cuda_graph
from serving.engine.messages import SamplingParams
from serving.engine.model_runner import ModelRunner
from serving.engine.parts import torch_parts
from serving.engine.structure import Structures
from serving.errors import Refused
from serving.model.config import ModelConfig
from serving.model.weights import load
from serving.settings import Settings, parse
from serving.tokenizer import Tokenizer

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPTS = [[1 + (7 * i + n) % 380 for i in range(length)] for n, length in enumerate((1, 15, 16, 17, 40, 3, 90))]
BLOCKS, SEQS = 40, 6


def by_definition(
    q_NHD: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: None, most_queries: int, most_keys: int, *,
    window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
) -> Tensor:  # fmt: skip
    """What torch documents of `varlen_attn`, one sequence after another; k and v are block × tokens × K × D."""
    assert window_size == (-1, 0)
    outs = []
    for row, used in enumerate(seqused_k.tolist()):
        q = q_NHD[starts[row] : starts[row + 1]]
        assert len(q) <= most_queries
        assert used <= most_keys
        keys, values = (pool[block_table[row].long()].flatten(0, 1)[:used] for pool in (k, v))
        mask = torch.ones(len(q), used, dtype=torch.bool).tril(used - len(q))
        heads = (part.transpose(0, 1)[None] for part in (q, keys, values))
        outs.append(F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(outs)


def flash_engine(
    root: Path, *, capture: Callable | None, attend: Callable = by_definition, block_size: int = 16,
    device: str = "cpu", dtype: torch.dtype = torch.float32,
) -> Engine:  # fmt: skip
    """An engine as `--attention flash` makes it; `capture` None: without graphs."""
    config, settings = ModelConfig.read(root / "config.json"), Settings(model=str(root), max_num_seqs=SEQS)
    parts = torch_parts(root, config, settings, on_bytes=lambda *_: None)
    model = load(root, config, device=torch.device(device), dtype=dtype, on_bytes=lambda *_: None)
    pool = FlashPool(
        layers=config.layers, num_blocks=BLOCKS, block_size=block_size, kv_heads=config.kv_heads,
        head_dim=config.head_dim, dtype=dtype, device=torch.device(device), attend=attend,
    )  # fmt: skip
    length = parts.max_model_len
    graphed = DecodeGraphs(model, pool, max_num_seqs=SEQS, max_model_len=length, capture=capture or cuda_graph)
    runner = ModelRunner(graphed if capture else model, pool, max_model_len=length)
    blocks = BlockManager(num_blocks=BLOCKS, block_size=block_size)
    tokenizer = Tokenizer(root)
    structures = Structures(root, vocab_size=config.vocab_size, eos_ids=tokenizer.eos_ids)
    return Engine(parts._replace(runner=runner, blocks=blocks), settings, tokenizer, structures)


def test_answers_are_those_of_sdpa_whether_or_not_batches_are_filled_up(tiny: Path) -> None:
    expected = Engine.load(tiny, Settings(model=str(tiny))).generate(PROMPTS, GREEDY)
    rooms: list[int] = []

    def eager(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            result = compute()
            rooms.append(len(result))
            return result

        return replay

    assert flash_engine(tiny, capture=None).generate(PROMPTS, GREEDY) == expected
    assert flash_engine(tiny, capture=eager).generate(PROMPTS, GREEDY) == expected
    assert set(rooms) <= {1, 2, 4, SEQS}
    assert SEQS in rooms


def test_it_is_refused_where_it_cannot_compute(tiny: Path) -> None:
    with pytest.raises(Refused, match="computes on CUDA in bfloat16, and this is cpu"):
        Engine.load(tiny, Settings(model=str(tiny), device="cpu", attention="flash"))
    for beside in (["--engine", "onnx"], ["--tensor-parallel-size", "2"]):
        with pytest.raises(Refused, match="--attention cannot be used with"):
            parse(["model", "--attention", "flash", *beside])


def test_it_is_not_chosen_unasked(tiny: Path) -> None:
    runner = Engine.load(tiny, Settings(model=str(tiny))).runner
    assert isinstance(runner, ModelRunner)
    assert not isinstance(runner.pool, FlashPool)
    assert not isinstance(runner.model, DecodeGraphs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention and CUDA graphs need a GPU")
def test_on_a_gpu_the_kernel_and_its_graphs_compute_what_is_defined(tiny: Path) -> None:
    real = {"attend": varlen_attn, "block_size": FLASH_BLOCK_TOKENS, "device": "cuda", "dtype": torch.bfloat16}
    plain = flash_engine(tiny, capture=None, **real).generate(PROMPTS, GREEDY)
    assert flash_engine(tiny, capture=cuda_graph, **real).generate(PROMPTS, GREEDY) == plain
    sdpa = Engine.load(tiny, Settings(model=str(tiny), device="cuda", dtype="bfloat16"))
    assert isinstance(sdpa.runner, ModelRunner)
    assert isinstance(sdpa.runner.pool, KVPool)
    same = [ours == theirs for ours, theirs in zip(plain, sdpa.generate(PROMPTS, GREEDY), strict=True)]
    assert sum(same) >= len(same) - 2  # bfloat16 rounds where two tokens are nearly alike
