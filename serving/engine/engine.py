"""The engine: sequences in, text out, one `step()` at a time. Knows no HTTP and no process; usable offline."""

import os
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from serving import logs
from serving.cache import open_store
from serving.engine.attention import KVPool, Pool
from serving.engine.attention_cpu import CpuPool
from serving.engine.block_manager import BlockManager
from serving.engine.messages import Counters, Output, SamplingParams
from serving.engine.model_runner import ModelRunner, Sampled
from serving.engine.scheduler import Scheduled, Scheduler
from serving.engine.sequence import Sequence
from serving.engine.spill import Spill, namespace
from serving.engine.structure import Structures
from serving.errors import Refused
from serving.kernels.cpu import Kernels, kernels
from serving.memory import available_bytes
from serving.model.config import ModelConfig
from serving.model.packed import fits, pack
from serving.model.quantized import GROUP, quantizable, quantize_layers
from serving.model.weights import load
from serving.settings import Settings
from serving.tokenizer import Tokenizer

BLOCK_SIZE = 16  # tokens: small enough to waste little, large enough that a gather copies long runs
STEP_TOKENS = {"cpu": 512, "cuda": 8192}  # a step's budget: how long a prompt's chunk may hold up the others' tokens
KV_MEMORY_SHARE = 0.5  # of what is free once the weights are loaded, unless --kv-bytes says


class Engine:
    def __init__(
        self, runner: ModelRunner, scheduler: Scheduler, tokenizer: Tokenizer, structures: Structures, *,
        max_model_len: int,
    ) -> None:  # fmt: skip
        self.runner, self.scheduler, self.tokenizer, self.structures = runner, scheduler, tokenizer, structures
        self.max_model_len = max_model_len
        self.sequences: dict[int, Sequence] = {}
        self._refused: list[Output] = []
        self._aborts = 0

    @classmethod
    def load(
        cls, root: Path, settings: Settings, *, on_bytes: Callable[[int, int], None] = lambda *_: None
    ) -> "Engine":
        """An engine for the package at `root`. Raises `Refused` when the package or the memory does not allow it."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
        config = ModelConfig.read(root / "config.json")
        tokenizer = Tokenizer(root)
        device = _device(settings)
        dtype = _dtype(settings, config, device)
        model = load(root, config, device=device, dtype=dtype, on_bytes=on_bytes)
        compiled = _kernels(config, device)
        weights = str(dtype).removeprefix("torch.") if settings.quantize == "none" else settings.quantize
        if settings.quantize != "none" and not quantizable(config):
            what = f"--quantize {settings.quantize} needs layers whose inputs are multiples of {GROUP}"
            raise Refused(what, where=str(root), fix="Serve the model with --quantize none")
        if compiled is not None:
            pack(model, compiled, form=weights)
        elif settings.quantize != "none":
            quantize_layers(model, form=weights)
        max_model_len = _max_model_len(settings, config, where=str(root))
        num_blocks = _num_blocks(settings, config, device, dtype=dtype, max_model_len=max_model_len)
        pool = _pool(config, compiled, num_blocks=num_blocks, dtype=dtype, device=device)
        spill = None
        if settings.kv_spill is not None:
            layout = f"{type(pool).__name__} {dtype} {weights} {BLOCK_SIZE}"
            space = namespace(root, layout=layout)
            spill = Spill(open_store(settings.kv_spill), pool, num_blocks=num_blocks, namespace=space)
        scheduler = Scheduler(
            BlockManager(num_blocks=num_blocks, block_size=BLOCK_SIZE, spill=spill),
            max_num_seqs=settings.max_num_seqs,
            max_step_tokens=max(STEP_TOKENS[device.type], settings.max_num_seqs),
            speculate_tokens=settings.speculate_tokens,
        )
        runner = ModelRunner(model, pool, max_model_len=max_model_len)
        structures = Structures(root, vocab_size=config.vocab_size, eos_ids=tokenizer.eos_ids)
        return cls(runner, scheduler, tokenizer, structures, max_model_len=max_model_len)

    @property
    def has_work(self) -> bool:
        return bool(self.sequences or self._refused)

    def add(
        self, seq_id: int, prompt_ids: list[int], params: SamplingParams, *,
        arrived_s: float, priority: int = 0, tenant: str = "",
    ) -> None:  # fmt: skip
        """Queues a sequence. One whose structure cannot be used is answered, by the next step, with what is wrong."""
        assert len(prompt_ids) + params.max_tokens <= self.max_model_len
        try:
            matcher = None if params.structure is None else self.structures.matcher(params.structure)
        except ValueError as error:
            self._refused.append(Output(seq_id, str(error), 0, finish_reason="error", queue_s=0.0))
            return
        seq = Sequence(
            seq_id, prompt_ids, params,
            decode=self.tokenizer.decode, arrived_s=arrived_s, priority=priority, tenant=tenant, matcher=matcher,
        )  # fmt: skip
        self.sequences[seq_id] = seq
        self.scheduler.add(seq)

    def abort(self, seq_id: int) -> None:
        """Forgets a sequence and frees its blocks; one that has finished already is no error."""
        if seq_id in self.sequences:
            self._aborts += 1
            self._forget(seq_id)

    @property
    def counters(self) -> Counters:
        s = self.scheduler
        return Counters(s.prefix_hit_tokens, s.prefix_miss_tokens, s.preemptions, self._aborts)

    def step(self) -> list[Output]:
        refused, self._refused = self._refused, []
        batch = self.scheduler.schedule()
        if not batch:
            return refused
        batch.sort(key=lambda item: (item.num_tokens > 1, -item.seq.num_computed))  # the order that the runner wants
        sampled = self.runner.run(batch)
        return refused + self._postprocess(batch, sampled)

    def generate(self, prompts: Seq[list[int]], params: SamplingParams) -> list[str]:
        """Answers all prompts and returns their texts: the engine as a library, with no server."""
        for index, prompt_ids in enumerate(prompts):
            self.add(index, prompt_ids, params, arrived_s=time.monotonic())
        texts = [""] * len(prompts)
        while self.has_work:
            for output in self.step():
                texts[output.seq_id] += output.text
        return texts

    def _forget(self, seq_id: int) -> None:
        self.scheduler.remove(self.sequences.pop(seq_id))

    def _postprocess(self, batch: list[Scheduled], sampled: list[list[Sampled]]) -> list[Output]:
        outputs = []
        for item, results in zip(batch, sampled, strict=True):
            seq, ended = item.seq, False
            seq.num_computed += item.num_tokens - len(item.guess)
            for index, result in enumerate(results):
                output = self._advance(seq, result)
                outputs.append(output)
                ended = output.finish_reason is not None
                if ended:
                    break
                seq.num_computed += index + 1 < len(results)  # a guess that came true is computed already
            self.scheduler.blocks.publish(seq)
            if ended:
                self._forget(seq.seq_id)
        return outputs

    def _advance(self, seq: Sequence, result: Sampled) -> Output:
        """Appends a sampled token to its sequence, and says what may be sent and whether the answer ends."""
        params, token_id = seq.params, result.token_id
        first = seq.num_output == 0
        text, finish_reason = "", None
        if params.max_tokens == 0:
            finish_reason = "stop" if params.embed else "length"
        else:
            seq.token_ids.append(token_id)
            if seq.matcher is not None and token_id not in self.tokenizer.eos_ids:
                seq.matcher.advance(token_id)
            ends = token_id in self.tokenizer.eos_ids and not params.ignore_eos
            if ends or token_id in params.stop_token_ids:
                finish_reason = "stop"
            else:
                text = seq.text.push(token_id)
                if result.logprob is not None:
                    seq.pending_logprobs.append(result.logprob)
                    seq.cumulative_logprob += result.logprob.logprob
                if seq.num_output == params.max_tokens:
                    finish_reason = "length"
                if seq.matcher is not None and seq.matcher.complete:
                    finish_reason = "stop"
        if finish_reason:
            text += seq.text.flush()
        if seq.text.stopped:
            finish_reason = "stop"
        if seq.matcher is not None and seq.matcher.error:
            text, finish_reason = seq.matcher.error, "error"
        return Output(
            seq_id=seq.seq_id,
            text=text,
            num_tokens=seq.num_output,
            finish_reason=finish_reason,
            logprobs=_release_logprobs(seq, all_of_them=finish_reason is not None and not seq.text.stopped),
            prompt_logprobs=seq.prompt_logprobs if first and params.prompt_logprobs else None,
            queue_s=seq.queue_s if first else None,
            cached_tokens=seq.cached_tokens if first else 0,
            cumulative_logprob=seq.cumulative_logprob,
            embedding=result.embedding,
        )


def _release_logprobs(seq: Sequence, *, all_of_them: bool) -> list | None:
    """The tokens whose text has gone out, so that a stop string takes its tokens' logprobs with it."""
    if seq.params.logprobs is None:
        return None
    ready = [entry for entry in seq.pending_logprobs if all_of_them or entry.offset < seq.text.emitted]
    seq.pending_logprobs = seq.pending_logprobs[len(ready) :]
    return ready


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


def _max_model_len(settings: Settings, config: ModelConfig, *, where: str) -> int:
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
