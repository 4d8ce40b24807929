"""A model laid over the ranks, in one order: stage, tensor, context, recompute, compile, weights, shards."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.config import TrainConfig
from trainer.model import Decoder, initialise, rope_tables
from trainer.package import make_decoder
from trainer.parallel.context import apply_context_parallel
from trainer.parallel.memory import apply_recompute, inner_block, plain_name
from trainer.parallel.pipeline import Elsewhere, Pipeline, is_tied, keep_stage, stages_of
from trainer.parallel.ranks import Ranks
from trainer.parallel.tensor import apply_tensor_parallel


@dataclass(frozen=True)
class Laid:
    """A model over the ranks: the parts that this rank holds, and what a step calls to use them."""

    parts: list[Decoder]
    run: nn.Module | Pipeline

    @property
    def module(self) -> nn.Module:
        """All that this rank holds, for an optimizer."""
        return self.parts[0] if len(self.parts) == 1 else nn.ModuleList(self.parts)


def lay_out(
    config: TrainConfig, *, vocab_size: int, ranks: Ranks, low_precision: bool, labels: int | None = None
) -> Laid:
    """The model of `config` as this rank has it, with the weights that `config.seed` gives: the same in any layout."""
    if ranks.layout is None or ranks.mesh is None:
        return _replicate(config, vocab_size=vocab_size, ranks=ranks, labels=labels)
    wanted, mesh = config.parallelism, ranks.mesh
    numbers = stages_of(wanted, pp_rank=mesh.get_local_rank("pp")) if wanted.pp > 1 else [0]
    parts = []
    for number in numbers:
        with torch.device("meta"):
            part = make_decoder(config, vocab_size=vocab_size, labels=labels)
        if wanted.pp > 1:
            keep_stage(part, stage=number, stages=wanted.pp * len(numbers))
        if wanted.tp > 1:
            apply_tensor_parallel(part, mesh["tp"])
        _place_tables(part, ranks.device)
        if ranks.cp_mesh is not None:
            apply_context_parallel(part, ranks.cp_mesh, seq=config.seq)
        apply_recompute(part, wanted.recompute)
        _compile(part, wanted.compile)
        _materialise_and_shard(part, config, ranks, low_precision=low_precision)
        if low_precision and wanted.pp > 1:  # a schedule runs forward and backward passes, and only the former autocast
            part.forward = torch.autocast(ranks.device.type, torch.bfloat16)(part.forward)
        parts.append(part)
    if wanted.pp == 1:
        return Laid(parts, parts[0])
    micro_batches = config.grad_accum(ranks.dp)
    return Laid(
        parts, Pipeline(parts, config=wanted, mesh=mesh["pp"], device=ranks.device, micro_batches=micro_batches)
    )


def _replicate(config: TrainConfig, *, vocab_size: int, ranks: Ranks, labels: int | None) -> Laid:
    """Every rank holds the model, and gradients are averaged while the backward pass still runs."""
    torch.manual_seed(config.seed)
    model = make_decoder(config, vocab_size=vocab_size, labels=labels).to(ranks.device)
    apply_recompute(model, config.parallelism.recompute)
    _compile(model, config.parallelism.compile)
    if ranks.world == 1:
        return Laid([model], model)
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    options = {"device_ids": ids, "gradient_as_bucket_view": True, "forward_sync_buffers": False}
    if ranks.memory is None:
        return Laid([model], DistributedDataParallel(model, **options))
    # In one piece, as far as it goes: nothing is under way meanwhile, and to meet takes longer than to add.
    run = DistributedDataParallel(model, **options, bucket_cap_mb=ranks.memory.place_bytes / 2**20)
    run.register_comm_hook(ranks, _average)
    return Laid([model], run)


def _average(ranks: Ranks, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    averaged: torch.futures.Future[Tensor] = torch.futures.Future()
    averaged.set_result(ranks.sum(bucket.buffer().div_(ranks.world)))
    return averaged


def _compile(part: Decoder, wanted: bool) -> None:
    """Block by block: all are alike, so one is compiled and the rest come from its cache."""
    for layer in part.model.layers:
        if wanted and not isinstance(layer, Elsewhere):
            layer.compile()


def _place_tables(part: Decoder, device: torch.device) -> None:
    part.model.cos_LW, part.model.sin_LW = (table.to(device) for table in rope_tables(part.config))


def _materialise_and_shard(part: Decoder, config: TrainConfig, ranks: Ranks, *, low_precision: bool) -> None:
    """Weights come into being block by block, each sharded before the next: no rank ever holds more than one in full."""
    mesh = _shard_mesh(ranks)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low_precision else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables stay in float32
    )
    # Between the micro-batches of a pipeline the weights stay gathered: they would be gathered again for each.
    reshard = config.parallelism.pp == 1
    for layer in part.model.layers:
        _materialise(layer, prefix=_prefix_of(part, layer), seed=config.seed, device=ranks.device)
        if mesh is not None and not isinstance(inner_block(layer), Elsewhere):
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    tied = is_tied(part) and isinstance(part.head, nn.Linear)
    for name, module in part.named_modules():
        its_own = any(True for _ in module.parameters(recurse=False)) and not name.startswith("model.layers.")
        if its_own and not (tied and module is part.head):
            _materialise(module, prefix=f"{name}.", seed=config.seed, device=ranks.device)
    if tied:
        part.lm_head.weight = part.model.embed_tokens.weight
    if mesh is not None:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def _shard_mesh(ranks: Ranks) -> DeviceMesh | None:
    """Over which ranks weights are sharded, and over which, before it, they are copies; None where there is but one."""
    assert ranks.layout is not None
    assert ranks.mesh is not None
    if ranks.layout.dp_replicate > 1 and not ranks.independent_replicas:
        return ranks.mesh["dp_replicate", "fsdp"]
    return ranks.mesh["fsdp"] if ranks.layout.dp_shard * ranks.layout.cp > 1 else None


def _prefix_of(part: Decoder, layer: nn.Module) -> str:
    return next(f"model.layers.{name}." for name, found in part.model.layers.named_children() if found is layer)


@torch.no_grad()
def _materialise(module: nn.Module, *, prefix: str, seed: int, device: torch.device) -> None:
    """Gives parameters on the meta device memory on `device`, and their part of the values that seed and name say."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        full = torch.empty(parameter.shape, device=device)
        initialise(plain_name(prefix + name), full, seed=seed)
        if isinstance(parameter, DTensor):
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))
        else:
            parameter.copy_(full)
