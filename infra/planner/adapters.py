"""What LoRA changes of a training run: how little is trained, what is kept all the same."""

from dataclasses import replace

from infra.planner.run import Run
from infra.spec import Training

FROZEN_BYTES = 4
"""The trainer keeps frozen weights in fp32, as it keeps all."""


def trained_parameters(training: Training) -> int | None:
    """Parameters of all adapters, r·(in + out) for each matrix (Hu et al. 2021); None where every weight is trained."""
    lora, model = training.lora, training.shape
    if lora is None:
        return None
    hidden, ffn = model.hidden, model.ffn
    q, kv = model.heads * model.width_of_head, model.kv_heads * model.width_of_head
    ends = {
        "q_proj": hidden + q,
        "k_proj": hidden + kv,
        "v_proj": hidden + kv,
        "o_proj": q + hidden,
        "gate_proj": hidden + ffn,
        "up_proj": hidden + ffn,
        "down_proj": ffn + hidden,
    }
    return model.layers * lora.rank * sum(ends[target] for target in set(lora.targets))


def adapted(run: Run, training: Training) -> Run:
    """`run` as `training.lora` has it. An adapter keeps the input of its matrix, so that activations are those of full training."""
    trained = trained_parameters(training)
    if trained is None:
        return run
    return replace(run, trained=trained, frozen_bytes=FROZEN_BYTES, adapters_keep_inputs=True)
