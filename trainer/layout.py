"""How many ranks share what: a config's `parallelism` held to the world, the model and the batch, with the numbers.

Plain arithmetic, without torch: a layout that cannot work is refused before any rank is started or any GPU waited for.
"""

from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.errors import Refused


@dataclass(frozen=True)
class Layout:
    """Ranks along each dimension of the mesh, outermost first: neighbours share a matrix, strangers only gradients."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    launches: int = 1
    """Of this layout, each a replica of local SGD with a world of its own."""

    @property
    def world(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks that draw different samples."""
        return self.launches * self.dp_replicate * self.dp_shard

    @property
    def replicated_only(self) -> bool:
        """Every rank holds the whole model and whole sequences: plain data parallel."""
        return self.world == self.dp_replicate


def layout_of(config: TrainConfig, *, world: int) -> Layout:
    """The layout of `config` over `world` ranks. Raises Refused for one that does not fit, with what would."""
    wanted = config.parallelism
    inner = wanted.pp * wanted.dp_shard * wanted.cp * wanted.tp
    if world % inner or (wanted.dp_replicate or world // inner) * inner != world:
        product = " x ".join(f"{name} {getattr(wanted, name)}" for name in ("pp", "dp_shard", "cp", "tp"))
        product += f" x dp_replicate {wanted.dp_replicate}" if wanted.dp_replicate else ""
        ranks = inner * (wanted.dp_replicate or max(world // inner, 1))
        raise Refused(
            f"{product} does not make up the world of {world} ranks",
            where="parallelism",
            fix=f"Start {ranks} ranks, or change a factor.",
        )
    launches = (config.local_sgd and config.local_sgd.launches) or 1
    replicas, shards = world // inner, wanted.dp_shard
    layout = Layout(pp=wanted.pp, dp_replicate=replicas, dp_shard=shards, cp=wanted.cp, tp=wanted.tp, launches=launches)
    _fit_tensor_parallel(config)
    _fit_context(config)
    _fit_pipeline(config, grad_accum=config.grad_accum(layout.dp))
    if config.local_sgd and layout.launches * layout.dp_replicate < 2:
        raise Refused(
            f"local_sgd has {layout.dp_replicate} replica to average: dp_replicate is {layout.dp_replicate}",
            where="local_sgd",
            fix="Start more ranks, lower the other factors of parallelism, or remove local_sgd.",
        )
    return layout


def _fit_tensor_parallel(config: TrainConfig) -> None:
    tp, model = config.parallelism.tp, config.model
    for name, count in (("heads", model.heads), ("kv_heads", model.kv_heads), ("ffn", model.ffn)):
        if count % tp:
            raise Refused(
                f"model.{name} {count} does not divide by tp {tp}",
                where="parallelism.tp",
                fix=f"Set tp to {_largest_divisor(count, at_most=tp)}, or model.{name} to a multiple of {tp}.",
            )


def _fit_context(config: TrainConfig) -> None:
    """Each context rank has two pieces of the sequence, and between matrices the tensor ranks share its part."""
    cp, tp = config.parallelism.cp, config.parallelism.tp
    pieces = (2 * cp if cp > 1 else 1) * tp
    if config.seq % pieces:
        below = config.seq // pieces * pieces
        what = f"cp {cp}" + (f" and tp {tp}" if tp > 1 else "")
        raise Refused(
            f"seq {config.seq} does not divide into the {pieces} pieces of {what}",
            where="parallelism",
            fix=f"Set seq to {below or pieces}.",
        )


def _fit_pipeline(config: TrainConfig, *, grad_accum: int) -> None:
    pp, interleaved = config.parallelism.pp, config.parallelism.pp_schedule == "interleaved"
    if pp == 1:
        return
    stages = pp * (config.parallelism.pp_stages_per_rank if interleaved else 1)
    if config.model.layers < stages:
        raise Refused(
            f"{config.model.layers} layers are too few for {stages} stages of a pipeline",
            where="parallelism.pp",
            fix=f"Set pp to at most {max(config.model.layers * pp // stages, 1)}.",
        )
    if grad_accum < pp or (interleaved and grad_accum % pp):
        rule = "a multiple of" if interleaved else "at least"
        raise Refused(
            f"a pipeline of {pp} ranks needs {rule} {pp} micro-batches a step and has {grad_accum}",
            where="global_batch",
            fix=f"Raise global_batch or lower micro_batch until grad_accum is {-(-grad_accum // pp) * pp}.",
        )


def fit_dataset(config: TrainConfig, *, vocab_size: int) -> None:
    """Tensor ranks share the vocabulary evenly. Raises Refused when they cannot."""
    tp = config.parallelism.tp
    if vocab_size % tp:
        raise Refused(
            f"the dataset's vocabulary of {vocab_size} does not divide by tp {tp}",
            where="parallelism.tp",
            fix=f"Make the dataset with vocab_size {-(-vocab_size // tp) * tp}, or set tp to "
            f"{_largest_divisor(vocab_size, at_most=tp)}.",
        )


def _largest_divisor(count: int, *, at_most: int) -> int:
    return next(factor for factor in range(min(count, at_most), 0, -1) if count % factor == 0)
