"""Time of a server's forward passes: decoding, prefill, and the two mixed at saturation.

A decoding step reads all weights (of experts, those that the batch goes through) and every sequence's cache once, multiplies for
each sequence, and pays a latency for each layer's kernels and all-reduces:
time = max(weights/(bandwidth·η), FLOPs/rate) + cache/(bandwidth·η) + L·(kernels + 2·all-reduce).
"""

from dataclasses import dataclass
from functools import cached_property

from infra.catalog import Gpu
from infra.planner.collectives import Group, collective_s
from infra.planner.kernels import product_tflops
from infra.planner.serve_memory import Format, streamed_bytes
from infra.planner.shape import Shape

STREAM_SHARE = {"fp32": 0.80, "bf16": 0.80, "fp8": 0.75, "int8": 0.66, "int4": 0.50}
"""Share of bandwidth at which matrix-vector products read weights: 0.8 where the format feeds the tensor cores, less where each
weight is first widened (gpt-fast's own int8 and int4 kernels)."""

CACHE_SHARE = 0.80
"""Share of bandwidth at which paged attention reads the cache."""

PREFILL_ATTENTION = 0.40
"""Share of bf16 peak at which prefill scores its tokens against those before them."""

KERNELS_PER_LAYER, KERNEL_S = 9, 5e-6
"""Kernels of a decoding layer under CUDA graphs, and what each costs beyond its bytes: start, tail, dependency."""

SCHEDULER_S = 0.5e-3
"""Host time between two steps of a server that overlaps little: sampling, block tables, detokenising."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """One replica's model and GPUs."""

    shape: Shape
    gpu: Gpu
    form: Format
    tp: int = 1
    pp: int = 1
    kv_bytes: float = 2
    node: int = 8

    @cached_property
    def flops_per_s(self) -> float:
        """FLOP/s that one GPU multiplies at in prefill."""
        return product_tflops(self.gpu, fp8=self.form.name == "fp8") * 1e12

    @cached_property
    def _read_s(self) -> tuple[float, float]:
        """Seconds to read once the weights that every token needs, and all routed experts."""
        rate = self.gpu.bandwidth_gbps * 1e9 * STREAM_SHARE[self.form.name]
        routed = self.shape.routed_matrices * self.form.bits / 8 / self.tp
        return (streamed_bytes(self.shape, form=self.form, tp=self.tp) - routed) / rate, routed / rate

    def _weights_s(self, tokens: float) -> float:
        """Seconds to read the weights that `tokens` tokens go through."""
        always, routed = self._read_s
        return always + routed * self.shape.experts.touched(tokens=tokens) if self.shape.experts else always

    @cached_property
    def _products_s(self) -> tuple[float, float]:
        """Seconds to multiply one token with the blocks, and with the output head."""
        shape, rate = self.shape, self.tp * self.flops_per_s
        return 2 * shape.active_matrices / rate, 2 * shape.embedding / rate

    @cached_property
    def _attention_s(self) -> tuple[float, float]:
        """Seconds to read one cached token, and to score one prompt token against one before it."""
        shape, gpu = self.shape, self.gpu
        read = shape.kv_bytes_per_token(bytes_per_value=self.kv_bytes, tp=self.tp)
        scores = 4 * shape.layers * shape.q_width / self.tp
        return read / (gpu.bandwidth_gbps * 1e9 * CACHE_SHARE), scores / (gpu.tflops_bf16 * 1e12 * PREFILL_ATTENTION)

    def mixed_s(self, *, decoding: float, context: float, prefill: float = 0.0, prefill_context: float = 0.0) -> float:
        """Seconds of one forward pass: `decoding` sequences of `context` tokens and `prefill` prompt tokens with
        `prefill_context` tokens before each on the mean."""
        tokens = decoding + prefill
        block, head = self._products_s  # of a prompt only the last token goes through the output head
        cached, score = self._attention_s
        attention = decoding * context * cached + prefill * prefill_context * score
        latency = self.shape.layers * (KERNELS_PER_LAYER * KERNEL_S + 2 * self._all_reduce_s(tokens))
        return (
            max(self._weights_s(tokens), block * tokens + head * decoding) + attention + latency + self._hops_s(tokens)
        )

    def _all_reduce_s(self, tokens: float) -> float:
        if self.tp == 1:
            return 0.0
        message = 2 * tokens * self.shape.hidden
        group = Group(size=self.tp, node=self.node)
        return collective_s("all_reduce", message_bytes=message, gpu=self.gpu, group=group)

    def _hops_s(self, tokens: float) -> float:
        if self.pp == 1:
            return 0.0
        message = 2 * tokens * self.shape.hidden / self.tp
        group = Group(size=2, stride=self.tp, node=self.node)
        return (self.pp - 1) * collective_s("send", message_bytes=message, gpu=self.gpu, group=group)

    def decode_s(self, *, batch: float = 1, context: float = 0) -> float:
        """Seconds until each of `batch` sequences has its next token."""
        return self.mixed_s(decoding=batch, context=context)

    def prefill_s(self, *, tokens: float) -> float:
        """Seconds of one prompt's forward pass."""
        return self.mixed_s(decoding=0, context=0, prefill=tokens, prefill_context=tokens / 2)

    def saturated_tokens_per_s(self, *, prompt: float, output: float, cache_tokens: float, most: int = 2048) -> float:
        """Output tokens a second of the replica with work always waiting: the batch fills the cache, and in each step as many
        prompt tokens are prefilled as sequences end."""
        batch = max(min(cache_tokens / (prompt + output), most), 1)
        arriving = batch * prompt / output
        step = self.mixed_s(decoding=batch, context=prompt + output / 2, prefill=arriving, prefill_context=prompt / 2)
        return batch / (step + SCHEDULER_S)
