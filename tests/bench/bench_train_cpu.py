"""Training on a CPU beside nanoGPT and Transformers' Trainer, at two settings of nanoGPT's: tokens a second and what is learnt.

`python tests/bench/bench_train_cpu.py [--text FILE] [--nanogpt DIR] [--settings small,large] [--steps N]` writes
build/bench/train_cpu.json. FILE (or BENCH_TEXT) is the text, by characters, of which the last tenth is held out; without it
random tokens are trained on and only the speed is told. DIR (or NANOGPT) is a checkout of karpathy/nanoGPT; without it
the peer is a bare loop over our own model. Peers take turns of some steps, and the middle of the turns' ratios counts.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from trainer.config import TrainConfig  # noqa: E402
from trainer.data import Cursor, TokenStream  # noqa: E402
from trainer.errors import StopSignal  # noqa: E402
from trainer.model import Decoder  # noqa: E402
from trainer.optim import learning_rate, make_optimizer  # noqa: E402
from trainer.parallel import Ranks  # noqa: E402
from trainer.step import make_deterministic, train_step  # noqa: E402


@dataclass(frozen=True)
class Setting:
    layers: int
    heads: int
    hidden: int
    seq: int
    batch: int
    steps: int
    turn: int
    ffn: int
    lr: float
    goal_nanogpt: float
    goal_transformers: float = 1.2

    def config(self) -> TrainConfig:
        return TrainConfig.model_validate(
            {
                "model": {
                    "layers": self.layers,
                    "hidden": self.hidden,
                    "heads": self.heads,
                    "kv_heads": self.heads,
                    "ffn": self.ffn,
                    "max_context": self.seq,
                },
                "seq": self.seq,
                "global_batch": self.batch,
                "micro_batch": self.batch,
                "steps": self.steps,
                "optim": {"lr": self.lr, "warmup_steps": self.steps // 20, "betas": (0.9, 0.99)},
            }
        )


SETTINGS = {
    # Where bf16 is native, its speed is what the larger setting is about; elsewhere both compute in float32.
    "small": Setting(4, 4, 128, 64, 12, steps=2000, turn=50, ffn=320, lr=8e-3, goal_nanogpt=1.1),
    "large": Setting(12, 12, 768, 256, 4, steps=200, turn=2, ffn=2048, lr=1e-3, goal_nanogpt=2.6),
}
Step = Callable[[int], None]


@dataclass
class Runner:
    """One trainer: what makes a step, and its logits for tokens (B, L)."""

    step: Step
    logits: Callable[[torch.Tensor], torch.Tensor]


def ours(setting: Setting, shard: Path, vocab: int) -> Runner:
    config = setting.config()
    stream = TokenStream([shard], dtype=np.dtype("<u2"))
    cursor = Cursor.over(stream, seq=setting.seq, global_batch=setting.batch, seed=0)
    model = Decoder(config.model, vocab_size=vocab)
    optimizer, stop = make_optimizer(model, config.optim), StopSignal()
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))

    def step(number: int) -> None:
        lr = learning_rate(number, steps=config.steps, config=config.optim)
        train_step(number, config, model=model, optimizer=optimizer, cursor=cursor, lr=lr, ranks=ranks, stop=stop)

    return Runner(step, model)


def bare(setting: Setting, shard: Path, vocab: int) -> Runner:
    """Our model, AdamW and clipping in the loop that anybody would write."""
    config, draw = setting.config(), random_windows(setting, shard)
    model = Decoder(config.model, vocab_size=vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, betas=(0.9, 0.99), weight_decay=0.1)

    def step(number: int) -> None:
        windows = draw(number)
        model(windows[:, :-1], windows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Runner(step, model)


def nanogpt(setting: Setting, shard: Path, vocab: int, folder: Path) -> Runner:
    """Its model, optimizer and step as its train.py has them for a CPU: float32, not compiled, lr 1e-3 to 1e-4."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    shape = {"n_layer": setting.layers, "n_head": setting.heads, "n_embd": setting.hidden, "vocab_size": vocab}
    model = module.GPT(module.GPTConfig(block_size=setting.seq, dropout=0.0, bias=False, **shape))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    draw, warm = random_windows(setting, shard), min(100, setting.steps // 2)
    schedule = setting.config().optim.model_copy(update={"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": warm})

    def step(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, steps=setting.steps, config=schedule)
        windows = draw(number)
        _, loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # it logs every step

    return Runner(step, lambda tokens: model(tokens, tokens)[0])


def random_windows(setting: Setting, shard: Path) -> Callable[[int], torch.Tensor]:
    data = np.memmap(shard, dtype="<u2", mode="r")

    def draw(number: int) -> torch.Tensor:
        starts = np.random.default_rng(number).integers(len(data) - setting.seq - 1, size=setting.batch)
        rows = [data[start : start + setting.seq + 1].astype(np.int64) for start in starts]
        return torch.from_numpy(np.stack(rows))

    return draw


def transformers_turn(setting: Setting, shard: Path, vocab: int) -> Callable[[], float]:
    """Seconds that Transformers' Trainer says its own loop took for a turn's steps."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    shape = setting.config().model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.max_context,
            tie_word_embeddings=True,
        )
    )
    draw = random_windows(setting, shard)
    rows = [row[:-1] for number in range(setting.turn) for row in draw(number)]
    arguments = TrainingArguments(
        output_dir=str(ROOT / "build" / "bench" / "transformers"),
        per_device_train_batch_size=setting.batch,
        max_steps=setting.turn,
        learning_rate=1e-3,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    examples: Any = [{"input_ids": row, "labels": row} for row in rows]
    return lambda: Trainer(model=model, args=arguments, train_dataset=examples).train().metrics["train_runtime"]


@torch.inference_mode()
def held_out_loss(runner: Runner, shard: Path, setting: Setting) -> float:
    """Nats a token over the whole held-out text in windows of the context, the same for all."""
    data = np.fromfile(shard, dtype="<u2").astype(np.int64)
    count = (len(data) - 1) // setting.seq
    x = torch.from_numpy(data[: count * setting.seq].reshape(count, setting.seq))
    y = torch.from_numpy(data[1 : count * setting.seq + 1].reshape(count, setting.seq))
    sums = [
        F.cross_entropy(runner.logits(some).float().transpose(1, 2), wanted, reduction="sum").item()
        for some, wanted in zip(x.split(64), y.split(64), strict=True)
    ]
    return sum(sums) / y.numel()


def write_shards(out: Path, text: Path | None) -> tuple[Path, Path | None, int]:
    """(training shard, held-out shard, size of the alphabet)."""
    train, held_out = out / "bench-train.bin", out / "bench-heldout.bin"
    if text is None:
        np.random.default_rng(0).integers(0, 65, 500_000).astype("<u2").tofile(train)
        return train, None, 65
    characters = text.read_text(encoding="utf-8")
    alphabet = {character: number for number, character in enumerate(sorted(set(characters)))}
    ids = np.array([alphabet[character] for character in characters], dtype="<u2")
    cut = int(0.9 * len(ids))
    ids[:cut].tofile(train)
    ids[cut:].tofile(held_out)
    return train, held_out, len(alphabet)


def race(name: str, setting: Setting, options: argparse.Namespace, out: Path) -> list[dict[str, object]]:
    train, held_out, vocab = write_shards(out, options.text)
    make_deterministic(0)
    peer_name = "nanoGPT" if options.nanogpt else "a bare loop"
    mine = ours(setting, train, vocab)
    theirs = nanogpt(setting, train, vocab, options.nanogpt) if options.nanogpt else bare(setting, train, vocab)
    third = transformers_turn(setting, train, vocab)
    third()
    turns: dict[str, list[float]] = {"mine": [], "theirs": [], "third": []}
    for number, first in enumerate(range(0, options.steps or setting.steps, setting.turn)):
        pair = [("mine", mine), ("theirs", theirs)]
        for who, runner in pair if number % 2 else reversed(pair):
            begun = time.perf_counter()
            for step in range(first, first + setting.turn):
                runner.step(step)
            turns[who].append(time.perf_counter() - begun)
        if number % 4 == 0:
            turns["third"].append(third())
    tokens = setting.turn * setting.batch * setting.seq

    def speed(title: str, other: str, every: int, goal: float | None) -> dict[str, object]:
        ratio = statistics.median(a / b for a, b in zip(turns[other], turns["mine"][::every], strict=True))
        rates = [round(tokens / statistics.median(turns[who])) for who in ("mine", other)]
        row = {"name": title, "ours": rates[0], "peer": rates[1], "ratio": round(ratio, 3)}
        return row | {"goal": goal, "unit": "tokens/s"}

    rows = [
        speed(f"{name}: speed against {peer_name}", "theirs", 1, setting.goal_nanogpt if options.nanogpt else 0.97),
        speed(f"{name}: speed against Transformers' Trainer", "third", 4, setting.goal_transformers),
    ]
    if held_out is not None:
        losses = [held_out_loss(runner, held_out, setting) for runner in (mine, theirs)]
        row = {"name": f"{name}: held-out loss beside {peer_name}", "ours": losses[0], "peer": losses[1]}
        rows.append(row | {"ratio": round(losses[0] / losses[1], 3), "goal": 1.0, "unit": "nats, less is better"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=os.environ.get("BENCH_TEXT"))
    parser.add_argument("--nanogpt", type=Path, default=os.environ.get("NANOGPT"))
    parser.add_argument("--settings", default="small,large")
    parser.add_argument("--steps", type=int, help="fewer than the setting has")
    options = parser.parse_args()
    options.text, options.nanogpt = (Path(path) if path else None for path in (options.text, options.nanogpt))
    out = ROOT / "build" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for name in options.settings.split(",") for row in race(name, SETTINGS[name], options, out)]
    (out / "train_cpu.json").write_text(json.dumps(rows, indent=2) + "\n")
    for leftover in out.glob("bench-*.bin"):
        leftover.unlink()
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
