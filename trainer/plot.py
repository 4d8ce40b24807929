"""`loss.png` and `cost.png`: the curves of a run, for people."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

_INK, _LINE, _RATE, _GRID = "#1f2933", "#2563eb", "#d97706", "#e4e7eb"
_SMOOTHING_ROWS = 24.0  # of the whole curve a twenty-fourth is averaged into each point


def plot_loss(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws loss (raw and smoothed) and learning rate over the steps of `log.jsonl`'s rows."""
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    rates = np.array([row["lr"] for row in rows])
    figure, axes = plt.subplots(figsize=(9, 5), dpi=130, layout="constrained")
    axes.plot(steps, losses, color=_LINE, alpha=0.25, linewidth=1, label="loss of the step")
    axes.plot(steps, _smooth(losses), color=_LINE, linewidth=2.2, label="smoothed")
    axes.set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold", pad=12)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats a token)")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = losses.min(), np.quantile(losses, 0.98)
    axes.set_ylim(low - 0.05 * (high - low) - 0.02, high + 0.1 * (high - low) + 0.02)

    right = axes.twinx()
    right.plot(steps, rates, color=_RATE, linewidth=1.2, linestyle=(0, (4, 2)), label="learning rate")
    right.set_ylabel("learning rate", color=_RATE)
    right.tick_params(axis="y", colors=_RATE)
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False, loc="upper right")
    figure.savefig(path)
    plt.close(figure)


def plot_cost(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws tokens a second, memory, and the shares of time and of floating-point operations, one below the other."""
    steps = [row["step"] for row in rows]
    figure, panels = plt.subplots(3, 1, figsize=(9, 8), dpi=130, sharex=True, layout="constrained")
    panels[0].plot(steps, [row["tokens_per_s"] for row in rows], color=_LINE, linewidth=1.8)
    panels[0].set_ylabel("tokens a second")
    panels[0].set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold", pad=12)
    memory = {"in use": "memory_peak_bytes", "held": "memory_reserved_peak_bytes"}
    shares = {"goodput": "goodput_ratio", "waiting for data": "data_wait_ratio", "MFU": "mfu_ratio", "HFU": "hfu_ratio"}
    for label, name in memory.items():
        panels[1].plot(steps, [row.get(name, np.nan) / 2**30 for row in rows], linewidth=1.8, label=label)
    panels[1].set_ylabel("peak memory (GiB)")
    for label, name in shares.items():
        if any(name in row for row in rows):
            panels[2].plot(steps, [row.get(name, np.nan) for row in rows], linewidth=1.8, label=label)
    panels[2].set_ylabel("share")
    panels[2].set_ylim(0, 1.02)
    panels[2].set_xlabel("step")
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(color=_GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[1:]:
        panel.legend(frameon=False, loc="best")
    figure.savefig(path)
    plt.close(figure)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean without the bias to the first value."""
    keep = 1 - min(1.0, _SMOOTHING_ROWS / max(len(values), 1))
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return np.array(smoothed)
