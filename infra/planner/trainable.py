"""What the trainer refuses of a layout when it starts: known from plain values, so said before any GPU is waited for."""

from infra.planner.run import Layout
from infra.spec import Training


def obstacle(layout: Layout, training: Training) -> str | None:
    """Why the trainer cannot run `training` in `layout`, with the numbers; None where it can."""
    model, tp, cp, pp = training.shape, layout.tp, layout.cp, layout.pp
    shared = {"kv_heads": model.kv_heads, "ffn": model.ffn, "vocabulary": training.data.vocab_size}
    uneven = [f"{name} {size}" for name, size in shared.items() if size % tp]
    pieces = (2 * cp if cp > 1 else 1) * tp
    replicas = layout.dp * training.launches
    micro_batches = training.global_batch // (training.micro_batch * layout.batch_ranks * training.launches)
    reasons = {
        f"tp {tp} does not divide {' and '.join(uneven)}": bool(uneven),
        f"seq {training.seq} does not divide into the {pieces} pieces of cp {cp} and tp {tp}": training.seq % pieces
        > 0,
        f"a pipeline of {pp} stages needs as many micro-batches a step, and has {micro_batches}": pp
        > micro_batches
        > 0,
        f"adapters are not split over tp {tp}": training.lora is not None and tp > 1,
        f"local_sgd averages replicas, and there is {replicas}": training.local_sgd is not None and replicas < 2,
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)
