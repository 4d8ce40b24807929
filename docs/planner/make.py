"""Tables and plots of docs/planner.md: `python docs/planner/make.py CALIBRATION.json HELD_OUT.json` prints Markdown and writes PNGs."""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from infra.planner.accuracy import Accuracy, Row, kind_of, measure, percentile

HERE = Path(__file__).parent
GOALS = {
    "training memory": "6 / 15 %",
    "training throughput": "15 / 35 %",
    "inference memory": "2 / 10 %",
    "decode throughput": "12 % / –",
    "all-reduce": "20 % / –",
    "oom and fits": "all right",
}


def source_of(raw: dict[str, str]) -> str:
    """A source in a few words: its repository or paper, without file, table and commit."""
    text = re.sub(r",? section .*| Table.*| @.*|\(.*", "", raw["source"])
    return (
        " ".join(text.split("/")[:2])
        .replace("docs ", "")
        .split(" scripts")[0]
        .split(" benchmarks")[0]
        .strip(" ,:")[:44]
    )


def table(found: Accuracy) -> str:
    lines = ["| quantity | count | median | 90th percentile | goal |", "| --- | ---: | ---: | ---: | --- |"]
    for kind, values in found.categories.items():
        if kind == "oom and fits":
            right = sum(row.rel_error == 0 for row in found.points if kind_of(row) == kind)
            lines.append(f"| {kind} | {values['count']:.0f} | {right} right | | {GOALS[kind]} |")
        else:
            lines.append(
                f"| {kind} | {values['count']:.0f} | {values['median']:.1%} | {values['p90']:.1%} | {GOALS[kind]} |"
            )
    return "\n".join(lines)


def left_out(rows: list[tuple[str, Row]]) -> str:
    """For each source, its error as it is, and after the one factor that would suit all other sources best."""
    lines = ["| left out | quantity | count | median | factor of the others | median with it |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    groups = defaultdict[tuple[str, str], list[Row]](list)
    for source, row in rows:
        if not isinstance(row.measured, bool):
            groups[source, kind_of(row)].append(row)
    for (source, kind), own in sorted(groups.items()):
        others = [r for (s, k), group in groups.items() if k == kind and s != source for r in group]
        if len(own) < 3 or len(others) < 3:
            continue
        factor = median(row.measured / row.predicted for row in others)
        before = median(abs(row.rel_error) for row in own)
        after = median(abs(row.predicted * factor / row.measured - 1) for row in own)
        lines.append(f"| {source} | {kind} | {len(own)} | {before:.1%} | {factor:.3f} | {after:.1%} |")
    return "\n".join(lines)


def plot(sets: dict[str, Accuracy]) -> None:
    """Predicted against measured, a panel a kind, with bands of the goals' medians."""
    kinds = [kind for kind in GOALS if kind != "oom and fits"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 8), constrained_layout=True)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        lows, highs = [], []
        for (name, found), mark in zip(sets.items(), ("o", "^"), strict=True):
            rows = [row for row in found.points if kind_of(row) == kind and row.measured > 0 and row.predicted > 0]
            axis.scatter(
                [r.measured for r in rows], [r.predicted for r in rows], s=18, marker=mark, alpha=0.6, label=name
            )
            lows += [min(r.measured, r.predicted) for r in rows]
            highs += [max(r.measured, r.predicted) for r in rows]
        ends = (min(lows) * 0.8, max(highs) * 1.25)
        axis.plot(ends, ends, color="black", lw=0.8)
        goal = float(GOALS[kind].split()[0]) / 100
        axis.fill_between(
            ends, [e * (1 - goal) for e in ends], [e * (1 + goal) for e in ends], alpha=0.12, color="green"
        )
        axis.set(xscale="log", yscale="log", title=kind, xlabel="measured", ylabel="predicted", xlim=ends, ylim=ends)
        axis.legend(fontsize=8)
    last = axes.flat[-1]
    for name, found in sets.items():
        errors = sorted(abs(row.rel_error) for row in found.points if kind_of(row) == "training throughput")
        last.plot(errors, [(n + 1) / len(errors) for n in range(len(errors))], label=f"throughput, {name}")
        errors = sorted(abs(row.rel_error) for row in found.points if kind_of(row) == "training memory")
        last.plot(errors, [(n + 1) / len(errors) for n in range(len(errors))], ls="--", label=f"memory, {name}")
    last.set(xlim=(0, 0.6), xlabel="|error|", ylabel="share of points", title="training, cumulative")
    last.legend(fontsize=8)
    figure.savefig(HERE / "predicted.png", dpi=90)


def main() -> None:
    files = {"calibration": Path(sys.argv[1]), "held out": Path(sys.argv[2])}
    raws = {name: json.loads(path.read_text()) for name, path in files.items()}
    sets = {name: measure(points) for name, points in raws.items()}
    sources = {raw["id"]: source_of(raw) for points in raws.values() for raw in points}
    for name, found in sets.items():
        print(f"### {name}: {len(raws[name])} points, {len(found.not_estimated)} not estimated\n\n{table(found)}\n")
    rows = [(sources[row.id], row) for found in sets.values() for row in found.points]
    print(f"### leave one source out\n\n{left_out(rows)}\n")
    worst = sorted((abs(row.rel_error), row.id, row.quantity, sources[row.id]) for _, row in rows)[-8:]
    for error, name, quantity, source in reversed(worst):
        print(f"| {name} | {source} | {quantity} | {error:.0%} |")
    print("p90 of all:", f"{percentile([abs(row.rel_error) for _, row in rows], 0.9):.1%}")
    plot(sets)


if __name__ == "__main__":
    main()
