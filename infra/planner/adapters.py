"""What LoRA and local SGD change of a training run: how little is trained, what is kept, how seldom replicas speak."""

from dataclasses import replace

from infra.catalog import Instance
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


def outer_bytes(training: Training) -> float:
    """Bytes that local SGD keeps for a parameter that is trained: weights at the last meeting and when sent, momentum, the sum that
    arrived, all fp32; and of one fragment how far it came (DiLoCo, Douillard et al. 2023 and 2025)."""
    return 0.0 if training.local_sgd is None else 16 + 4 / training.local_sgd.fragments


def meeting_s(training: Training, *, parameters: int, instance: Instance) -> float:
    """Seconds a step that the meetings of launches take: each averages every weight once in `every_steps`, in fp32, by a ring, whose
    every member sends 2·(n − 1)/n of it (Patarasuk and Yuan 2009); the nodes of a launch share it out."""
    assert training.local_sgd is not None
    n, gbps = training.launches, instance.network_gbps * training.nodes_of_launch
    return 2 * (n - 1) / n * 4 * parameters * 8 / (gbps * 1e9) / training.local_sgd.every_steps


def adapted(run: Run, training: Training) -> Run:
    """`run` as `training.lora` and `training.local_sgd` have it.

    An adapter keeps the input of its matrix, so that activations are those of full training.
    """
    if training.local_sgd:
        states = replace(run.states, moments=run.states.moments + outer_bytes(training))
        run = replace(run, states=states)
        if training.launches == 1:  # else replicas inside of a launch average at every step, and launches meet apart
            run = replace(run, meets_every_steps=training.local_sgd.every_steps)
    trained = trained_parameters(training)
    if trained is None:
        return run
    return replace(run, trained=trained, frozen_bytes=FROZEN_BYTES, adapters_keep_inputs=True)
