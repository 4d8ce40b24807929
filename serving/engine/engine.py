"""The engine: sequences in, text out, one `step()` at a time. Knows no HTTP and no process; usable offline."""

import math
import os
import random
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import torch

from serving.engine.messages import AdapterRef, Counters, Output, SamplingParams
from serving.engine.model_runner import Sampled
from serving.engine.pace import Pace, prompt_work
from serving.engine.parts import Parts
from serving.engine.scheduler import Scheduled, Scheduler
from serving.engine.sequence import Sequence
from serving.engine.structure import Matcher, Structures
from serving.errors import Refused
from serving.model.config import ModelConfig
from serving.pressure import MemoryWatch
from serving.settings import Settings
from serving.tokenizer import Tokenizer

WARM_UP = ((1, 8), (1, 32), (3, 64))  # (prompts at once, tokens of each); the first step of all is a slow one
WARM_UP_STEPS = 5
IDLE_S = 0.01  # the longest that a new request waits for a step with nothing in it


class Engine:
    def __init__(self, parts: Parts, settings: Settings, tokenizer: Tokenizer, structures: Structures) -> None:
        self.runner, self.adapters, self.usage = parts.runner, parts.adapters, parts.usage
        self.max_model_len, self.vocab_size, self._embeds = parts.max_model_len, parts.vocab_size, parts.embeds
        self.scheduler = Scheduler(
            parts.blocks,
            adapters=parts.adapters,
            pace=Pace(look=parts.usage.work.look),
            max_num_seqs=settings.max_num_seqs,
            max_step_tokens=max(parts.step_tokens, settings.max_num_seqs),
            speculate_tokens=settings.speculate_tokens,
        )
        self.tokenizer, self.structures, self._model = tokenizer, structures, settings.model
        self.sequences: dict[int, Sequence] = {}
        self._memory = MemoryWatch(settings.min_free_bytes)
        self._refused: list[Output] = []
        self._forming: dict[int, Future[Matcher]] = {}  # sequences whose structure is being prepared
        self._aborts = self._output_tokens = 0

    @classmethod
    def load(
        cls, root: Path, settings: Settings, *, on_bytes: Callable[[int, int], None] = lambda *_: None
    ) -> "Engine":
        """An engine for the package at `root`. Raises `Refused` when the package or the memory does not allow it."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
        config = ModelConfig.read(root / "config.json")
        tokenizer = Tokenizer(root)
        if settings.engine == "onnx":
            from serving.engine.onnx_model import onnx_parts as make_parts
        else:
            from serving.engine.parts import torch_parts as make_parts
        parts = make_parts(root, config, settings, on_bytes=on_bytes)
        structures = Structures(root, vocab_size=config.vocab_size, eos_ids=tokenizer.eos_ids)
        return cls(parts, settings, tokenizer, structures)

    @property
    def has_work(self) -> bool:
        return bool(self.sequences or self._refused)

    def add(
        self, seq_id: int, prompt_ids: list[int], params: SamplingParams, *,
        arrived_s: float, priority: int = 0, tenant: str = "", adapter: AdapterRef | None = None,
    ) -> None:  # fmt: skip
        """Queues a sequence. One that cannot be answered as it stands is told, by the next step, what is wrong."""
        assert len(prompt_ids) + params.max_tokens <= self.max_model_len
        if params.embed and not self._embeds:
            text = "This server's engine has no embeddings"
            self._refused.append(Output(seq_id, text, 0, finish_reason="error", queue_s=0.0))
            return
        seq = Sequence(
            seq_id, prompt_ids, params,
            decode=self.tokenizer.decode, arrived_s=arrived_s, priority=priority, tenant=tenant, adapter=adapter,
        )  # fmt: skip
        self.sequences[seq_id] = seq
        if params.structure is None:
            self.scheduler.add(seq)
        else:
            self._forming[seq_id] = self.structures.begin(params.structure)

    def abort(self, seq_id: int) -> None:
        """Forgets a sequence and frees its blocks; one that has finished already is no error."""
        if seq_id in self.sequences:
            self._aborts += 1
            self._forget(seq_id)

    @property
    def counters(self) -> Counters:
        s = self.scheduler
        spill = s.blocks.spill
        return Counters(
            s.prefix_hit_tokens, s.prefix_miss_tokens, s.preemptions, self._aborts,
            self.adapters.loads, self.adapters.evictions, self._output_tokens,
            0 if spill is None else spill.store.failures,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Makes a few tokens: memory is touched, and the pace knows how long steps take. Raises `Refused` (see below).

        The prompts are random, so that no prefix is found again and none is in anybody's way.
        """
        chance = random.Random(0)  # noqa: S311
        for count, length in WARM_UP:
            length = min(length, self.max_model_len // 2)
            prompts = [[chance.randrange(self.vocab_size) for _ in range(length)] for _ in range(count)]
            most = min(WARM_UP_STEPS, self.max_model_len - length)
            self.generate(prompts, SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True))
        self.scheduler.pace.settle()
        self._check_numbers()
        self.scheduler.prefix_hit_tokens = self.scheduler.prefix_miss_tokens = 0  # no request was among them
        self._output_tokens = 0

    def _check_numbers(self) -> None:
        """Raises `Refused` for weights that give none, as of a training that diverged."""
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0)
        self.add(0, [0], params, arrived_s=time.monotonic())
        (output,) = self.step()
        if not math.isfinite(output.cumulative_logprob):
            raise Refused(
                "the weights give no numbers", where=self._model, fix="Export the model again, or an earlier one"
            )

    def step(self) -> list[Output]:
        begin_s = time.perf_counter()
        refused, self._refused = self._refused, []
        refused += self._take_formed()
        self.scheduler.short_of_memory = self._memory.look()
        batch = self.scheduler.schedule()
        refused += self._give_up_lost()
        if not batch:
            if not refused:  # whoever is here waits for a structure or an adapter
                background: list[Future[Any]] = [*self._forming.values(), *self.adapters.coming]
                wait(background, IDLE_S, FIRST_COMPLETED)
            return refused
        batch.sort(key=lambda item: (item.num_tokens > 1, -item.seq.num_computed))  # the order that the runner wants
        self.adapters.group(batch)
        decodes, prompt = self._work(batch)
        run_s = time.perf_counter()
        sampled = self.runner.run(batch)
        self.usage.add(batch, time.perf_counter() - run_s)
        outputs = refused + self._postprocess(batch, sampled)
        self.scheduler.pace.learn(decodes=decodes, prompt=prompt, seconds=time.perf_counter() - begin_s)
        return outputs

    def _work(self, batch: list[Scheduled]) -> tuple[int, float]:
        """(tokens of those that decode, the others' prompt work)."""
        look = self.scheduler.pace.look
        prompts = [item for item in batch if item.seq.num_uncomputed > 1]
        work = sum(prompt_work(item.num_tokens, item.seq.num_computed, look=look) for item in prompts)
        return sum(item.num_tokens for item in batch) - sum(item.num_tokens for item in prompts), work

    def _take_formed(self) -> list[Output]:
        """Queues the sequences whose structure is ready, and answers those that can have none."""
        refused = []
        for seq_id in [seq_id for seq_id, future in self._forming.items() if future.done()]:
            try:
                self.sequences[seq_id].matcher = self._forming.pop(seq_id).result()
            except ValueError as error:
                del self.sequences[seq_id]
                refused.append(Output(seq_id, str(error), 0, finish_reason="error", queue_s=0.0))
            else:
                self.scheduler.add(self.sequences[seq_id])
        return refused

    def _give_up_lost(self) -> list[Output]:
        """Answers those whose adapter could not be read."""
        lost, self.scheduler.lost = self.scheduler.lost, []
        for seq, _ in lost:
            del self.sequences[seq.seq_id]
        return [Output(seq.seq_id, why, 0, finish_reason="failed", queue_s=0.0) for seq, why in lost]

    def generate(
        self, prompts: Seq[list[int]], params: SamplingParams, *, adapters: Seq[AdapterRef | None] = ()
    ) -> list[str]:
        """Answers all prompts, each by its adapter where `adapters` are given: the engine as a library, with no server."""
        for index, prompt_ids in enumerate(prompts):
            adapter = adapters[index] if adapters else None
            self.add(index, prompt_ids, params, arrived_s=time.monotonic(), adapter=adapter)
        texts = [""] * len(prompts)
        while self.has_work:
            for output in self.step():
                texts[output.seq_id] += output.text
        return texts

    def _forget(self, seq_id: int) -> None:
        seq = self.sequences.pop(seq_id)
        if self._forming.pop(seq_id, None) is None:
            self.scheduler.remove(seq)

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
            self._output_tokens += 1
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
