"""What an engine is made of, from a package and the settings: a runner, its memory, and what a step may take."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from serving import logs
from serving.cache import open_store
from serving.engine.adapters import Adapters, LlamaAdapting
from serving.engine.attention import KVPool, Pool
from serving.engine.attention_cpu import CpuPool
from serving.engine.block_manager import BlockManager
from serving.engine.model_runner import ModelRunner, Sampled
from serving.engine.scheduler import Scheduled
from serving.engine.spill import Spill, namespace
from serving.engine.usage import Peaks, Usage, Work, measure_peaks
from serving.errors import Refused
from serving.kernels.cpu import Kernels, kernels
from serving.memory import available_bytes
from serving.model.config import ModelConfig
from serving.model.packed import fits, pack
from serving.model.quantized import GROUP, quantizable, quantize_layers
from serving.model.weights import load
from serving.settings import Settings

BLOCK_SIZE = 16  # tokens: small enough to waste little, large enough that a gather copies long runs
STEP_TOKENS = {"cpu": 512, "cuda": 8192}  # the most that a step computes
KV_MEMORY_SHARE = 0.5  # of what is free once the weights are loaded, unless --kv-bytes says


class Runner(Protocol):
    def run(self, batch: Seq[Scheduled]) -> list[list[Sampled]]:
        """Computes the batch and returns each sequence's next tokens. Decodes come first, longest first."""
        ...


class Parts(NamedTuple):
    runner: Runner
    blocks: BlockManager
    adapters: Adapters
    usage: Usage
    step_tokens: int
    max_model_len: int
    vocab_size: int
    embeds: bool = True  # whether what the model computes for a position is a state, and not yet the logits


def torch_parts(root: Path, config: ModelConfig, settings: Settings, *, on_bytes: Callable[[int, int], None]) -> Parts:
    """The parts of an engine that computes with torch. Raises `Refused`."""
    device = _device(settings)
    dtype = _dtype(settings, config, device)
    form = str(dtype).removeprefix("torch.") if settings.quantize == "none" else settings.quantize
    if settings.quantize != "none" and not quantizable(config):
        what = f"--quantize {settings.quantize} needs layers whose inputs are multiples of {GROUP}"
        raise Refused(what, where=str(root), fix="Serve the model with --quantize none")
    model = load(root, config, device=device, dtype=dtype, on_bytes=on_bytes)
    compiled = _kernels(config, device)
    if compiled is not None:
        pack(model, compiled, form=form)
    elif settings.quantize != "none":
        quantize_layers(model, form=form)
    max_model_len = checked_model_len(settings, config, where=str(root))
    num_blocks = _num_blocks(settings, config, device, dtype=dtype, max_model_len=max_model_len)
    pool = _pool(config, compiled, num_blocks=num_blocks, dtype=dtype, device=device)
    spill = None
    if settings.kv_spill is not None:
        space = namespace(root, layout=f"{type(pool).__name__} {dtype} {form} {BLOCK_SIZE}")
        spill = Spill(open_store(settings.kv_spill), pool, num_blocks=num_blocks, namespace=space)
    adapting = LlamaAdapting(model, config, device=device)
    return Parts(
        runner=ModelRunner(model, pool, max_model_len=max_model_len),
        blocks=BlockManager(num_blocks=num_blocks, block_size=BLOCK_SIZE, spill=spill),
        adapters=Adapters(adapting, max_count=settings.max_adapters, max_bytes=settings.adapter_bytes),
        usage=Usage(Work.of(config, form=form, dtype=dtype), peaks_of(settings, device, dtype)),
        step_tokens=STEP_TOKENS[device.type],
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
    )


def peaks_of(settings: Settings, device: torch.device, dtype: torch.dtype) -> Peaks:
    """The hardware's peaks as the settings declare them, else as they are measured."""
    bytes_per_s, flops_per_s = settings.peak_bytes_per_s, settings.peak_flops_per_s
    if bytes_per_s is None or flops_per_s is None:
        measured = measure_peaks(device, dtype)
        return Peaks(bytes_per_s or measured.bytes_per_s, flops_per_s or measured.flops_per_s)
    return Peaks(bytes_per_s, flops_per_s)


def _device(settings: Settings) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise Refused("there is no CUDA device", where="--device cuda", fix="Use --device cpu, or run on a GPU node")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if settings.device == "auto" else settings.device)


def _kernels(config: ModelConfig, device: torch.device) -> Kernels | None:
    """The compiled kernels, where the machine and the model's shape allow them."""
    found = kernels() if device.type == "cpu" and fits(config) else None
    if isinstance(found, str):
        logs.event("slow_kernels", level="warning", message=f"torch computes alone, more slowly: {found}")
        return None
    return found


def _pool(
    config: ModelConfig, compiled: Kernels | None, *, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> Pool:
    shape = {"layers": config.layers, "num_blocks": num_blocks, "kv_heads": config.kv_heads}
    if compiled is not None:
        return CpuPool(compiled, **shape, head_dim=config.head_dim, dtype=dtype)
    return KVPool(**shape, head_dim=config.head_dim, block_size=BLOCK_SIZE, dtype=dtype, device=device)


def _dtype(settings: Settings, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU unless the package says float32; on a CPU float32, which every one computes fast."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return torch.float32 if device.type == "cpu" or config.dtype == "float32" else torch.bfloat16


def checked_model_len(settings: Settings, config: ModelConfig, *, where: str) -> int:
    asked = settings.max_model_len or config.max_positions
    if asked > config.max_positions:
        what = f"--max-model-len {asked} is beyond the model's {config.max_positions} positions"
        raise Refused(what, where=where, fix=f"Give at most {config.max_positions}")
    return asked


def _num_blocks(
    settings: Settings, config: ModelConfig, device: torch.device, *, dtype: torch.dtype, max_model_len: int
) -> int:
    """Blocks for keys and values: --kv-bytes, else what the sequences can use within a share of the free memory."""
    per_block = BLOCK_SIZE * config.kv_bytes_per_token(bytes_per_value=dtype.itemsize)
    per_seq = -(-max_model_len // BLOCK_SIZE)
    if settings.kv_bytes is not None:
        num_blocks = settings.kv_bytes // per_block
    else:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
        num_blocks = min(settings.max_num_seqs * per_seq, int(free * KV_MEMORY_SHARE) // per_block)
    if num_blocks < per_seq:
        what = f"{num_blocks * per_block:,} bytes cannot hold the keys and values of one {max_model_len}-token sequence"
        fix = f"Give --kv-bytes {per_seq * per_block} or more, or a smaller --max-model-len"
        raise Refused(what, where="--kv-bytes", fix=fix)
    return num_blocks
