"""SLW2xx: what must fit into memory, with a margin."""

from collections.abc import Iterator
from math import floor

from infra.catalog import instance
from infra.checks.demand import batch_ranks
from infra.checks.finding import Finding, Patch
from infra.planner import Plan, ServicePlan
from infra.planner import plan as make_plan
from infra.planner.estimate import MARGIN
from infra.spec import Service, Stack, Training


def training_fits(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW201: a rank that needs more memory than it has dies at its first step."""
    run = plan.training
    if run is None or stack.training is None or run.memory.value <= MARGIN * run.memory_limit_gib:
        return
    largest = max(run.memory.parts, key=lambda part: run.memory.parts[part])
    fits = _largest_micro_batch(stack, stack.training)
    yield Finding(
        code="SLW201",
        severity="error",
        where="training.micro_batch",
        message=f"a rank needs about {run.memory.value:.1f} GiB and may use {MARGIN:.0%} of {run.memory_limit_gib:.1f}; "
        f"the most goes to {largest} ({run.memory.parts[largest]:.1f} GiB)",
        fix=f"micro_batch: {fits}, which is the same training in smaller bites"
        if fits
        else "a smaller model, a shorter seq, or an instance with more memory: not even micro_batch: 1 fits",
        patch={"training.micro_batch": fits} if fits else None,
    )


def replica_fits(_: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW202: weights, KV cache and runtime of one replica against its memory."""
    for service in plan.services:
        if service.memory and service.memory.value > MARGIN * service.memory_limit_gib:
            beside = sum(gib for part, gib in service.memory.parts.items() if part != "KV cache")
            spare = floor(10 * (MARGIN * service.memory_limit_gib - beside)) / 10
            yield Finding(
                code="SLW202",
                severity="error",
                where=f"services.{service.name}.kv_gib",
                message=f"a replica needs about {service.memory.value:.1f} GiB and may use {MARGIN:.0%} of {service.memory_limit_gib:.1f}",
                fix=f"kv_gib: {spare:.1f}" if spare > 0 else "more memory: the weights alone do not fit",
                patch={f"services.{service.name}.kv_gib": spare} if spare > 0 else None,
            )


def context_fits_cache(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW203: a request of the full context must fit the KV cache; SLW204: and the model must have as many positions."""
    declared = {service.name: service for service in stack.services}
    for service in plan.services:
        if service.concurrency is not None and service.concurrency < 1:
            yield Finding(
                code="SLW203",
                severity="error",
                where=f"services.{service.name}.kv_gib",
                message=f"the KV cache holds {service.kv_tokens} tokens, and one request may have {service.max_model_len}",
                fix=f"max_model_len: {service.kv_tokens}, or a larger {_size_key(declared[service.name])}"
                if service.kv_tokens
                else f"a larger {_size_key(declared[service.name])}",
                patch=_room_for_context(service, declared[service.name]),
            )
    for spec in stack.services:
        made_by = stack.trains(spec)
        if made_by and spec.max_model_len and spec.max_model_len > made_by.shape.max_context:
            yield Finding(
                code="SLW204",
                severity="error",
                where=f"services.{spec.name}.max_model_len",
                message=f"max_model_len {spec.max_model_len} is above the model's {made_by.shape.max_context} positions",
                fix=f"max_model_len: {made_by.shape.max_context}, or leave it out",
                patch={f"services.{spec.name}.max_model_len": made_by.shape.max_context},
            )


def _size_key(declared: Service) -> str:
    return "kv_gib" if declared.kv_share is None else "kv_share"


def _room_for_context(service: ServicePlan, declared: Service) -> Patch | None:
    """A cache of one whole context where there is memory for it; else the context that the cache holds."""
    assert service.kv_tokens is not None
    assert service.max_model_len is not None
    if service.kv_tokens and service.memory and declared.kv_share is None:
        kv_gib = declared.kv_gib
        wanted = floor(1000 * kv_gib * service.max_model_len / service.kv_tokens + 2) / 1000
        if service.memory.value - kv_gib + wanted <= MARGIN * service.memory_limit_gib:
            return {f"services.{service.name}.kv_gib": wanted}
    return {f"services.{service.name}.max_model_len": service.kv_tokens} if service.kv_tokens else None


def _largest_micro_batch(stack: Stack, training: Training) -> int | None:
    """The most sequences at once that fit and divide `global_batch`; memory grows with them, so halves are searched."""
    ranks = batch_ranks(training, instance(stack.pool(training.pool).instance))
    each = training.global_batch // ranks if training.global_batch % ranks == 0 else None
    sizes = [n for n in range(1, min(training.micro_batch, 4096)) if each is None or each % n == 0]

    def fits(micro_batch: int) -> bool:
        smaller = training.model_copy(update={"micro_batch": micro_batch})
        run = make_plan(stack.model_copy(update={"training": smaller, "services": ()})).training
        return run is not None and run.memory.value <= MARGIN * run.memory_limit_gib

    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None
