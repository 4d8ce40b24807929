"""Training on a CPU beside nanoGPT and Transformers' Trainer, at two settings of nanoGPT's: tokens a second and what is learnt.

`python tests/bench/bench_train_cpu.py [--text FILE] [--nanogpt DIR] [--settings small,large] [--steps N] [--clock cpu]` writes
build/bench/train_cpu.json. FILE (or BENCH_TEXT) is the text, by characters, of which the last tenth is held out; without
it random tokens are trained on and only the speed is told. DIR (or NANOGPT) is a checkout of karpathy/nanoGPT; without it
a bare loop over our own model stands in. Each trainer has a process of its own; they take turns of some steps, and the
middle of the turns' ratios counts. On a machine with other work, processor time (`--clock cpu`) says more than the wall's.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
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
from trainer.model import Decoder, parameter_count  # noqa: E402
from trainer.optim import learning_rate, make_optimizer  # noqa: E402
from trainer.parallel import Ranks  # noqa: E402
from trainer.step import cpu_has_bfloat16, make_deterministic, train_step  # noqa: E402

OUT = ROOT / "build" / "bench"


@dataclass(frozen=True)
class Setting:
    """A shape of nanoGPT's and ours beside it, whose gated feed-forward part is as wide as makes as many parameters."""

    layers: int
    heads: int
    hidden: int
    ffn: int
    seq: int
    batch: int
    schedule: int  # steps that the learning rate is planned for
    steps: int  # that are made where nothing else is said
    turn: int
    lr: float
    goal_nanogpt: float | None
    goal_transformers: float = 1.2

    def config(self) -> TrainConfig:
        shape = {"layers": self.layers, "hidden": self.hidden, "ffn": self.ffn, "max_context": self.seq}
        return TrainConfig.model_validate(
            {
                "model": {**shape, "heads": self.heads, "kv_heads": self.heads},
                "seq": self.seq,
                "global_batch": self.batch,
                "micro_batch": self.batch,
                "steps": self.schedule,
                "optim": {"lr": self.lr, "warmup_steps": self.schedule // 20, "betas": (0.9, 0.99)},
            }
        )


SETTINGS = {
    "small": Setting(4, 4, 128, 352, 64, 12, schedule=2000, steps=2000, turn=50, lr=8e-3, goal_nanogpt=1.1),
    # 2.6 is of bf16, which is chosen where the processor computes in it; elsewhere both compute in float32, four fifths of
    # it in matrix products, and there is no goal.
    "large": Setting(
        *(12, 12, 768, 2048, 256, 4),
        schedule=200,
        steps=20,
        turn=2,
        lr=1e-3,
        goal_nanogpt=2.6 if cpu_has_bfloat16() else None,
    ),
}


@dataclass(frozen=True)
class Task:
    """What a process is given."""

    setting: Setting
    steps: int
    train: Path
    held_out: Path | None
    vocab: int
    nanogpt: Path | None


class Turns:
    """The other end of `Peer`: waits for each turn, and tells how long it took."""

    def __init__(self, connection: Connection, turn: int) -> None:
        self._connection, self._turn = connection, turn

    def before(self, step: int) -> None:
        if step % self._turn == 0:
            self._connection.recv()
            self._begun = time.perf_counter(), time.process_time()

    def after(self, step: int) -> None:
        if (step + 1) % self._turn == 0:
            wall_s, cpu_s = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
            self._connection.send({"wall": wall_s, "cpu": cpu_s})


Logits = Callable[[torch.Tensor], torch.Tensor]
"""Of tokens (B, L)."""


def ours(task: Task, turns: Turns) -> tuple[torch.nn.Module, Logits]:
    config = task.setting.config()
    stream = TokenStream([task.train], dtype=np.dtype("<u2"))
    cursor = Cursor.over(stream, seq=config.seq, global_batch=config.global_batch, seed=0)
    model = Decoder(config.model, vocab_size=task.vocab)
    optimizer, stop = make_optimizer(model, config.optim), StopSignal()
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))
    for step in range(task.steps):
        turns.before(step)
        lr = learning_rate(step, steps=config.steps, config=config.optim)
        train_step(step, config, model=model, optimizer=optimizer, cursor=cursor, lr=lr, ranks=ranks, stop=stop)
        turns.after(step)
    return model, model


def bare(task: Task, turns: Turns) -> tuple[torch.nn.Module, Logits]:
    """Our model, AdamW and clipping in the loop that anybody would write."""
    config, draw = task.setting.config(), random_windows(task)
    model = Decoder(config.model, vocab_size=task.vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.setting.lr, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(task.steps):
        turns.before(step)
        windows = draw(step)
        model(windows[:, :-1], windows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.after(step)
    return model, model


def nanogpt(task: Task, turns: Turns) -> tuple[torch.nn.Module, Logits]:
    """Its model, optimizer and step as its train.py has them for a CPU: float32, not compiled, lr 1e-3 to 1e-4."""
    assert task.nanogpt is not None
    spec = importlib.util.spec_from_file_location("nanogpt_model", task.nanogpt / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    setting = task.setting
    shape = {"n_layer": setting.layers, "n_head": setting.heads, "n_embd": setting.hidden, "vocab_size": task.vocab}
    model = module.GPT(module.GPTConfig(block_size=setting.seq, dropout=0.0, bias=False, **shape))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    draw, warm = random_windows(task), min(100, setting.schedule // 2)
    schedule = setting.config().optim.model_copy(update={"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": warm})
    for step in range(task.steps):
        turns.before(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=setting.schedule, config=schedule)
        windows = draw(step)
        _, loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # it logs every step
        turns.after(step)
    return model, lambda tokens: model(tokens, tokens)[0]


def transformers(task: Task, turns: Turns) -> tuple[torch.nn.Module, Logits]:
    """Llama of our shape in the loop of Transformers' Trainer, which tells of its steps by a callback."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    setting = task.setting
    shape = LlamaConfig(
        vocab_size=task.vocab,
        hidden_size=setting.hidden,
        intermediate_size=setting.ffn,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        max_position_embeddings=setting.seq,
        tie_word_embeddings=True,
    )
    model, draw = LlamaForCausalLM(shape), random_windows(task)
    arguments = TrainingArguments(
        output_dir=str(OUT / "transformers"),
        per_device_train_batch_size=setting.batch,
        max_steps=task.steps,
        learning_rate=1e-3,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )

    class Told(TrainerCallback):
        def on_step_begin(self, _arguments: Any, state: Any, _control: Any, **_more: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            turns.before(state.global_step)

        def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_more: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            turns.after(state.global_step - 1)

    rows = [row[:-1] for step in range(task.steps) for row in draw(step)]
    examples: Any = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[Told()]).train()
    return model, lambda tokens: model(tokens).logits


def random_windows(task: Task) -> Callable[[int], torch.Tensor]:
    data, setting = np.memmap(task.train, dtype="<u2", mode="r"), task.setting

    def draw(step: int) -> torch.Tensor:
        starts = np.random.default_rng(step).integers(len(data) - setting.seq - 1, size=setting.batch)
        rows = [data[start : start + setting.seq + 1].astype(np.int64) for start in starts]
        return torch.from_numpy(np.stack(rows))

    return draw


@torch.inference_mode()
def held_out_loss(logits: Logits, shard: Path, seq: int) -> float:
    """Nats a token over the whole held-out text in windows of the context, the same for all."""
    data = np.fromfile(shard, dtype="<u2").astype(np.int64)
    count = (len(data) - 1) // seq
    x = torch.from_numpy(data[: count * seq].reshape(count, seq))
    y = torch.from_numpy(data[1 : count * seq + 1].reshape(count, seq))
    sums = [
        F.cross_entropy(logits(some).float().transpose(1, 2), wanted, reduction="sum").item()
        for some, wanted in zip(x.split(64), y.split(64), strict=True)
    ]
    return sum(sums) / y.numel()


PEERS = {"ours": ours, "nanoGPT": nanogpt, "a bare loop": bare, "Transformers' Trainer": transformers}


def work(connection: Connection, who: str, task: Task) -> None:
    """A process: all turns, and then how large the model is and what it has learnt."""
    make_deterministic(0)
    model, logits = PEERS[who](task, Turns(connection, task.setting.turn))
    model.eval()
    loss = None if task.held_out is None else held_out_loss(logits, task.held_out, task.setting.seq)
    connection.send({"parameters": parameter_count(model), "loss": loss})


class Peer:
    """One trainer in its process."""

    def __init__(self, who: str, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, who, task), daemon=True)
        self.process.start()
        other.close()
        self.turns: list[dict[str, float]] = []

    def turn(self) -> None:
        self.connection.send("go")
        self.turns.append(self.connection.recv())

    def end(self) -> dict[str, Any]:
        found = self.connection.recv()
        self.process.join()
        return found


def write_shards(text: Path | None) -> tuple[Path, Path | None, int]:
    """(training shard, held-out shard, size of the alphabet)."""
    train, held_out = OUT / "bench-train.bin", OUT / "bench-heldout.bin"
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


def race(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    setting = SETTINGS[name]
    if options.steps:
        setting = replace(setting, turn=max(min(setting.turn, options.steps // 4), 1))
    train, held_out, vocab = write_shards(options.text)
    turns = max((options.steps or setting.steps) // setting.turn, 2)
    task = Task(setting, turns * setting.turn, train, held_out, vocab, options.nanogpt)
    first = "nanoGPT" if options.nanogpt else "a bare loop"
    peers = {who: Peer(who, task) for who in ("ours", first, "Transformers' Trainer")}
    for number in range(turns):
        for peer in list(peers.values())[:: 1 if number % 2 else -1]:
            peer.turn()
    ends = {who: peer.end() for who, peer in peers.items()}
    tokens = setting.turn * setting.batch * setting.seq
    seconds = {
        who: [turn[options.clock] for turn in peer.turns[1:]] for who, peer in peers.items()
    }  # the first warms up

    def speed(other: str, goal: float | None) -> dict[str, object]:
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds[other], strict=True))
        rates = [round(tokens / statistics.median(seconds[who])) for who in ("ours", other)]
        row = {"name": f"{name}: speed against {other}", "ours": rates[0], "peer": rates[1], "ratio": round(ratio, 3)}
        return row | {"goal": goal, "unit": "tokens/s" if options.clock == "wall" else "tokens a CPU second"}

    def beside(what: str, key: str, goal: float | None, unit: str) -> dict[str, object]:
        mine, theirs = ends["ours"][key], ends[first][key]
        row = {"name": f"{name}: {what} beside {first}", "ours": mine, "peer": theirs, "ratio": round(mine / theirs, 3)}
        return row | {"goal": goal, "unit": unit}

    rows = [
        speed(first, setting.goal_nanogpt if options.nanogpt else 0.97),
        speed("Transformers' Trainer", setting.goal_transformers),
        beside("parameters", "parameters", None, "parameters"),
    ]
    if held_out is not None:
        rows.append(beside("held-out loss", "loss", 1.0, "nats, less is better"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=os.environ.get("BENCH_TEXT"))
    parser.add_argument("--nanogpt", type=Path, default=os.environ.get("NANOGPT"))
    parser.add_argument("--settings", default="small,large")
    parser.add_argument("--steps", type=int, help="others than the setting has")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    options.text, options.nanogpt = (Path(path) if path else None for path in (options.text, options.nanogpt))
    OUT.mkdir(parents=True, exist_ok=True)
    rows = [row for name in options.settings.split(",") for row in race(name, options)]
    (OUT / "train_cpu.json").write_text(json.dumps(rows, indent=2) + "\n")
    for leftover in OUT.glob("bench-*.bin"):
        leftover.unlink()
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
