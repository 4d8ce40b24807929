"""What a rank on a CPU needs: the rank's memory and the speed that this trainer was measured at.

A laptop's run is small, so that Python's and torch's own pages weigh as much as the model, and its speed goes by the cores.
"""

from infra.catalog import Instance
from infra.planner.adapters import outer_bytes, trained_parameters
from infra.planner.estimate import GIB, Estimate, total
from infra.planner.shape import Shape
from infra.spec import Training

STATE_BYTES = 16
"""fp32 weight, gradient and two Adam moments a parameter (ZeRO, sec. 3, with fp32 gradients)."""

RUNTIME_GIB = 0.45
"""torch's own pages in a rank."""


def memory(training: Training) -> Estimate:
    """Peak memory of one rank, GiB, in fp32.

    Activations a layer: s·b·h·(34 → 18 + 4f/h) values of 4 bytes over 2 with attention that stores no scores (Korthikanti et al.
    2022, with the gated MLP's width); eager cross-entropy keeps 12 bytes a logit.
    """
    model, tokens = training.shape, training.micro_batch * training.seq
    n = Shape.of(model, vocab_size=training.data.vocab_size).parameters
    trained = trained_parameters(training)
    each = STATE_BYTES + outer_bytes(training)
    state = n * each if trained is None else 4 * n + trained * each
    layer = tokens * model.hidden * (18 + 4 * model.ffn / model.hidden) * 2
    return total(
        "GiB",
        {
            "weights, gradients, optimizer": state / GIB,
            "gradient buckets": (n if trained is None else trained) * 4 / GIB,
            "activations": model.layers * layer / GIB,
            "logits": 12 * tokens * training.data.vocab_size / GIB,
            "runtime": RUNTIME_GIB,
        },
        f"{STATE_BYTES} bytes of state a parameter (DDP, fp32, AdamW)",
        "no recomputation, attention that stores no scores (Korthikanti et al. 2022)",
    )


def tokens_per_s(training: Training, *, instance: Instance) -> float:
    """Tokens a second of the whole run: FLOPs of a token (PaLM's count) at what a core reaches."""
    flops = Shape.of(training.shape, vocab_size=training.data.vocab_size).flops_per_token(seq=training.seq)
    if training.lora:
        flops *= 2 / 3  # of the backward pass only the half that leads to inputs
    cpus = min(instance.cpus, training.nodes * (training.resources.cpus if training.resources else instance.cpus))
    return cpus * instance.gflops_per_cpu * 1e9 / flops
