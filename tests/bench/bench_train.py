"""Tokens a second of our training step against a bare loop and against Transformers' Trainer, interleaved.

`python tests/bench/bench_train.py [--seconds S]` writes build/bench/train.json. All train the same shape, from the same
weights, on the same tokens, with one thread; each takes turns, so that a busy machine is busy for all. The middle of the
turns' ratios counts, because a mean would count the other programs of the machine.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from trainer.config import TrainConfig  # noqa: E402
from trainer.data import Cursor, TokenStream  # noqa: E402
from trainer.errors import StopSignal  # noqa: E402
from trainer.model import Decoder  # noqa: E402
from trainer.optim import learning_rate, make_optimizer  # noqa: E402
from trainer.parallel import Ranks  # noqa: E402
from trainer.step import make_deterministic, train_step  # noqa: E402

VOCAB = 2048
TURN_STEPS = 12
CONFIG = TrainConfig.model_validate(
    {
        "model": {"layers": 4, "hidden": 96, "heads": 3, "kv_heads": 3, "ffn": 256, "max_context": 256},
        "seq": 256,
        "global_batch": 2,  # what one of the default's two ranks does
        "micro_batch": 2,
        "steps": 10_000,
        "optim": {"lr": 6e-3},
    }
)
"""The default of the local stack, on one rank."""


def ours(model: Decoder, cursor: Cursor) -> Callable[[int], None]:
    optimizer, stop = make_optimizer(model, CONFIG.optim), StopSignal()
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))

    def step(number: int) -> None:
        lr = learning_rate(number, steps=CONFIG.steps, config=CONFIG.optim)
        train_step(number, CONFIG, model=model, optimizer=optimizer, cursor=cursor, lr=lr, ranks=ranks, stop=stop)

    return step


def bare(model: Decoder, cursor: Cursor) -> Callable[[int], None]:
    """Model, loss, optimizer step; nothing else, not even clipping. The batches are drawn beforehand."""
    optimizer = make_optimizer(model, CONFIG.optim)
    drawn = (cursor.batch(n, micro=0, micro_batch=2, rank=0, world=1) for n in range(TURN_STEPS))
    batches = [batch.tensors(torch.device("cpu")) for batch in drawn]

    def step(number: int) -> None:
        tokens, targets, _ = batches[number % TURN_STEPS]
        model(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(turn: Callable[[int], None], first: int) -> float:
    begun = time.perf_counter()
    for number in range(first, first + TURN_STEPS):
        turn(number)
    return time.perf_counter() - begun


def transformers_turn(cursor: Cursor) -> Callable[[], float]:
    """Seconds that Transformers' Trainer says its own loop took for as many steps."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    shape = CONFIG.model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.max_context,
            tie_word_embeddings=True,
        )
    )
    windows = np.concatenate(
        [cursor.batch(n, micro=0, micro_batch=2, rank=0, world=1).tokens_BL for n in range(TURN_STEPS)]
    )
    examples = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in windows]

    def turn() -> float:
        arguments = TrainingArguments(
            output_dir=str(ROOT / "build" / "bench" / "transformers"),
            per_device_train_batch_size=2,
            max_steps=TURN_STEPS,
            learning_rate=CONFIG.optim.lr,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        result = Trainer(model=model, args=arguments, train_dataset=examples).train()
        return result.metrics["train_runtime"]

    return turn


def row(name: str, mine: list[float], theirs: list[float], *, goal: float) -> dict[str, object]:
    tokens = TURN_STEPS * CONFIG.global_batch * CONFIG.seq
    ratio = statistics.median(their / my for my, their in zip(mine, theirs, strict=True))
    rates = {"ours": tokens / statistics.median(mine), "peer": tokens / statistics.median(theirs)}
    return {
        "name": name,
        **{who: round(rate) for who, rate in rates.items()},
        "ratio": round(ratio, 3),
        "goal": goal,
        "unit": "tokens/s",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=45.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_deterministic(0)
    out = ROOT / "build" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    shard = out / "train-00000.bin"
    np.random.default_rng(0).integers(0, VOCAB, 400_000).astype("<u2").tofile(shard)
    cursor = Cursor.over(TokenStream([shard], dtype=np.dtype("<u2")), seq=CONFIG.seq, global_batch=2, seed=0)

    our_step, bare_step = (make(Decoder(CONFIG.model, vocab_size=VOCAB), cursor) for make in (ours, bare))
    turns: dict[str, list[float]] = {"ours": [], "bare": [], "transformers": []}
    try:
        their_turn = transformers_turn(cursor)
        their_turn()
    except ImportError as error:  # its Trainer asks for accelerate, which nothing else here does
        print(f"without Transformers' Trainer: {str(error).splitlines()[0]}")
        their_turn = None
    for warm_up in (our_step, bare_step):
        seconds_of(warm_up, 0)
    end, number = time.perf_counter() + options.seconds, 0
    while time.perf_counter() < end or not turns["ours"]:
        pair = [("ours", our_step), ("bare", bare_step)]
        for name, step in pair if number % 2 else reversed(pair):
            turns[name].append(seconds_of(step, number * TURN_STEPS))
        if their_turn:
            turns["transformers"].append(their_turn())
        number += 1
    rows = [row("training step against a bare loop", turns["ours"], turns["bare"], goal=0.97)]
    if turns["transformers"]:
        rows.append(row("training step against Transformers' Trainer", turns["ours"], turns["transformers"], goal=1.2))
    (out / "train.json").write_text(json.dumps(rows, indent=2) + "\n")
    shard.unlink()
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
