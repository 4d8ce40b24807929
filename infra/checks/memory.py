"""SLW2xx: what must fit into memory, with a margin."""

from collections.abc import Iterator

from infra.checks.finding import Finding
from infra.planner import Plan
from infra.spec import Stack

MARGIN = 0.95
"""Share of a memory that an estimate may fill: what the estimates err by, and what allocators lose."""


def training_fits(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW201: a rank that needs more memory than it has dies at its first step."""
    run = plan.training
    if run is None or stack.training is None or run.memory.value <= MARGIN * run.memory_limit_gib:
        return
    largest = max(run.memory.parts, key=lambda part: run.memory.parts[part])
    yield Finding(
        code="SLW201",
        severity="error",
        where="training.micro_batch",
        message=f"a rank needs about {run.memory.value:.1f} GiB and may use {MARGIN:.0%} of {run.memory_limit_gib:.1f}; "
        f"the most goes to {largest} ({run.memory.parts[largest]:.1f} GiB)",
        fix=f"micro_batch: {max(stack.training.micro_batch // 2, 1)}, a smaller model, or an instance with more memory",
    )


def replica_fits(_: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW202: weights, KV cache and runtime of one replica against its memory."""
    for service in plan.services:
        if service.memory and service.memory.value > MARGIN * service.memory_limit_gib:
            spare = MARGIN * service.memory_limit_gib - (service.memory.value - service.memory.parts["KV cache"])
            yield Finding(
                code="SLW202",
                severity="error",
                where=f"services.{service.name}.kv_gib",
                message=f"a replica needs about {service.memory.value:.1f} GiB and may use {MARGIN:.0%} of {service.memory_limit_gib:.1f}",
                fix=f"kv_gib: {spare:.1f}" if spare > 0 else "more memory: the weights alone do not fit",
            )


def context_fits_cache(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW203: a request of the full context must fit the KV cache; SLW204: and the model's positions."""
    for service in plan.services:
        if service.concurrency is not None and service.concurrency < 1:
            yield Finding(
                code="SLW203",
                severity="error",
                where=f"services.{service.name}.kv_gib",
                message=f"the KV cache holds {service.kv_tokens} tokens, and one request may have {service.max_model_len}",
                fix=f"max_model_len: {service.kv_tokens}, or a larger kv_gib",
            )
    for spec in stack.services:
        made_by = stack.trains(spec)
        if made_by and spec.max_model_len and spec.max_model_len > made_by.model.max_context:
            yield Finding(
                code="SLW204",
                severity="error",
                where=f"services.{spec.name}.max_model_len",
                message=f"max_model_len {spec.max_model_len} is above the model's {made_by.model.max_context} positions",
                fix=f"max_model_len: {made_by.model.max_context}, or leave it out",
            )
