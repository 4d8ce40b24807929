"""What an engine is made of, from a package and the settings: a runner, its memory, and what a step may take."""

import os
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
from serving.engine.attention_flash import FLASH_BLOCK_TOKENS, FlashPool
from serving.engine.block_manager import BlockManager
from serving.engine.graphs import DecodeGraphs
from serving.engine.model_runner import ModelRunner, Sampled
from serving.engine.ranks import Begin, RankedPool, Ranks
from serving.engine.scheduler import Scheduled
from serving.engine.spill import Spill, namespace
from serving.engine.usage import Peaks, Usage, Work, measure_peaks
from serving.errors import Refused
from serving.kernels.cpu import Kernels, kernels
from serving.memory import available_bytes, limit_bytes, resident_bytes
from serving.model.config import ModelConfig
from serving.model.llama import Llama
from serving.model.packed import fits, pack
from serving.model.quantized import GROUP, quantizable, quantize_layers
from serving.model.shard import Shard, join, narrowed
from serving.model.weights import load
from serving.settings import Settings

BLOCK_SIZE = 16  # tokens: small enough to waste little, large enough that a gather copies long runs
STEP_TOKENS = {"cpu": 512, "cuda": 8192}  # the most that a step computes
LEAST_MODEL_LEN = 16
KV_MEMORY_SHARE = 0.5  # the most of what is free once the weights are loaded, unless the settings say


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


class Loaded(NamedTuple):
    """A model, or one rank's share of it, with its weights in the form that it computes with."""

    model: Llama
    kernels: Kernels | None
    device: torch.device
    dtype: torch.dtype  # of the vocabulary's weight, and of keys and values
    form: str  # of the layers' weights


def load_share(
    root: Path, config: ModelConfig, settings: Settings, shard: Shard, *, on_bytes: Callable[[int, int], None]
) -> Loaded:
    """What one rank computes with. Raises `Refused`."""
    device = _device(settings, shard)
    dtype = _dtype(settings, config, device)
    if settings.attention == "flash" and (device.type != "cuda" or dtype != torch.bfloat16):
        what = f"FlashAttention computes on CUDA in bfloat16, and this is {device.type} in {dtype}"
        raise Refused(what, where="--attention flash", fix="Use --attention sdpa, or --device cuda --dtype bfloat16")
    form = str(dtype).removeprefix("torch.") if settings.quantize == "none" else settings.quantize
    local = narrowed(config, shard.size, where=str(root))
    if settings.quantize != "none" and not quantizable(local):
        what = f"--quantize {settings.quantize} needs layers whose inputs are multiples of {GROUP}"
        raise Refused(what, where=str(root), fix="Serve the model with --quantize none")
    model = load(root, local, device=device, dtype=dtype, on_bytes=on_bytes, shard=shard)
    compiled = _kernels(local, device)
    if compiled is not None:
        form = pack(model, compiled, form=form)
    elif settings.quantize != "none":
        quantize_layers(model, form=form)
    return Loaded(model, compiled, device, dtype, form)


def torch_parts(root: Path, config: ModelConfig, settings: Settings, *, on_bytes: Callable[[int, int], None]) -> Parts:
    """The parts of an engine that computes with torch, alone or with other ranks. Raises `Refused`."""
    size = settings.tensor_parallel_size
    max_model_len = checked_model_len(settings, config, where=str(root))
    narrowed(config, size, where=str(root))  # before any other process is started
    ranks = Ranks(root, settings) if size > 1 else None
    loaded = load_share(root, config, settings, Shard(0, size), on_bytes=on_bytes)
    if ranks is not None:
        ranks.meet()
    num_blocks = num_blocks_of(settings, config, device=loaded.device, dtype=loaded.dtype, max_model_len=max_model_len)
    pool, model = pool_of(loaded, num_blocks=num_blocks, attention=settings.attention), loaded.model
    if isinstance(pool, FlashPool):
        model = DecodeGraphs(model, pool, max_num_seqs=settings.max_num_seqs, max_model_len=max_model_len)
    if ranks is not None:
        join(loaded.model, Shard(0, size), config, ask=ranks.ask_logits)
        ranks.send(Begin(num_blocks, max_model_len))
        pool = RankedPool(pool, ranks)
    layout = f"{type(pool).__name__} {loaded.dtype} {loaded.form}"
    spill = spill_of(settings, root, pool, num_blocks=num_blocks, layout=layout)
    return Parts(
        runner=ModelRunner(model, pool, max_model_len=max_model_len),
        blocks=BlockManager(num_blocks=num_blocks, block_size=block_size_of(settings), spill=spill),
        adapters=adapters_of(loaded, config, settings, Shard(0, size)),
        usage=Usage(Work.of(config, form=loaded.form, dtype=loaded.dtype), peaks_of(settings, loaded.device)),
        step_tokens=STEP_TOKENS[loaded.device.type],
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
    )


def spill_of(settings: Settings, root: Path, pool: Pool, *, num_blocks: int, layout: str) -> Spill | None:
    """Where blocks go that memory gives up, if the settings say so; `layout` is what a block's bytes depend on."""
    if settings.kv_spill is None:
        return None
    space = namespace(root, layout=f"{layout} {block_size_of(settings)}")
    return Spill(open_store(settings.kv_spill), pool, num_blocks=num_blocks, namespace=space)


def adapters_of(loaded: Loaded, config: ModelConfig, settings: Settings, shard: Shard) -> Adapters:
    adapting = LlamaAdapting(loaded.model, config, device=loaded.device, shard=shard)
    return Adapters(adapting, max_count=settings.max_adapters, max_bytes=settings.adapter_bytes)


def peaks_of(settings: Settings, device: torch.device) -> Peaks:
    """The hardware's peaks as the settings declare them, else as they are measured: on GPUs, those of all ranks."""
    bytes_per_s, flops_per_s = settings.peak_bytes_per_s, settings.peak_flops_per_s
    if bytes_per_s is None or flops_per_s is None:
        measured = measure_peaks(device, ranks=settings.tensor_parallel_size)
        return Peaks(bytes_per_s or measured.bytes_per_s, flops_per_s or measured.flops_per_s)
    return Peaks(bytes_per_s, flops_per_s)


def _device(settings: Settings, shard: Shard) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise Refused("there is no CUDA device", where="--device cuda", fix="Use --device cpu, or run on a GPU node")
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if shard.size > torch.cuda.device_count():
        what = f"--tensor-parallel-size {shard.size} needs as many GPUs, and there are {torch.cuda.device_count()}"
        raise Refused(what, where="command line", fix=f"Give at most {torch.cuda.device_count()}")
    return torch.device("cuda", shard.rank)


def _kernels(config: ModelConfig, device: torch.device) -> Kernels | None:
    """The compiled kernels, where the machine and the model's shape allow them."""
    found = kernels() if device.type == "cpu" and fits(config) else None
    if isinstance(found, str):
        logs.event("slow_kernels", level="warning", message=f"torch computes alone, more slowly: {found}")
        return None
    return found


def block_size_of(settings: Settings) -> int:
    return FLASH_BLOCK_TOKENS if settings.attention == "flash" else BLOCK_SIZE


def pool_of(loaded: Loaded, *, num_blocks: int, attention: str = "sdpa") -> Pool:
    """Memory for the keys and values of the heads that this rank has."""
    config = loaded.model.config
    shape = {"layers": config.layers, "num_blocks": num_blocks, "kv_heads": config.kv_heads}
    if loaded.kernels is not None:
        return CpuPool(loaded.kernels, **shape, head_dim=config.head_dim, dtype=loaded.dtype)
    where = {"dtype": loaded.dtype, "device": loaded.device}
    if attention == "flash":
        return FlashPool(**shape, block_size=FLASH_BLOCK_TOKENS, head_dim=config.head_dim, **where)
    return KVPool(**shape, block_size=BLOCK_SIZE, head_dim=config.head_dim, **where)


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
    if asked < LEAST_MODEL_LEN:
        what = f"{asked} tokens of prompt and answer together are too few to serve"
        raise Refused(what, where="--max-model-len", fix=f"Give at least {LEAST_MODEL_LEN}")
    return asked


def num_blocks_of(
    settings: Settings, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, max_model_len: int
) -> int:
    """Blocks for keys and values: --kv-bytes or --kv-share, else what the sequences can use within half the free memory.

    A block's bytes are those of all ranks together, which on GPUs have memory each.
    """
    block_size = block_size_of(settings)
    per_block = block_size * config.kv_bytes_per_token(bytes_per_value=dtype.itemsize)
    per_seq = -(-max_model_len // block_size)
    if settings.kv_bytes is not None:
        num_blocks = settings.kv_bytes // per_block
        most = limit_bytes() - resident_bytes(os.getpid())
        if device.type == "cpu" and settings.kv_bytes > most:  # which would be noticed as late as they are all in use
            what = f"{settings.kv_bytes:,} bytes are more than the {most:,} that this machine has beside the weights"
            raise Refused(what, where="--kv-bytes", fix="Give fewer, or a share of what is free: --kv-share 0.8")
    else:
        free = (
            torch.cuda.mem_get_info(device)[0] * settings.tensor_parallel_size
            if device.type == "cuda"
            else available_bytes()
        )
        num_blocks = int(free * (settings.kv_share or KV_MEMORY_SHARE)) // per_block
        if settings.kv_share is None:
            num_blocks = min(num_blocks, settings.max_num_seqs * per_seq)
    if num_blocks < per_seq:
        what = f"{num_blocks * per_block:,} bytes cannot hold the keys and values of one {max_model_len}-token sequence"
        fix = f"Give --kv-bytes {per_seq * per_block} or more, or a smaller --max-model-len"
        raise Refused(what, where="--kv-bytes", fix=fix)
    return num_blocks
