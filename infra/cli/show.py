"""How a plan and its findings look on a terminal."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from infra.checks import Finding
from infra.cli.against import Change
from infra.planner import Estimate, Plan, ServicePlan, TrainingPlan
from infra.spec import line_finder

WIDTH_OF_BAR = 24
FILLS = "█▓▒░▚"


def show_plan(plan: Plan, *, stack: str, console: Console) -> None:
    """Pools, training and services: what will run, whether it fits, how long, how much."""
    console.print(f"[bold]Plan of stack {stack}[/]")
    console.print(
        Group(
            _pools(plan),
            *_elsewhere(plan),
            *_chosen(plan),
            *_training(plan.training),
            *(part for service in plan.services for part in _service(service)),
        )
    )


def show_findings(findings: Iterable[Finding], *, console: Console, file: Path | None = None) -> None:
    """Each finding with its numbers and its fix, and of a stack file the line that it is about."""
    line_of = line_finder(file) if file else None
    for finding in findings:
        colour = "red" if finding.severity == "error" else "yellow"
        console.print(
            Text.assemble(
                (f"{finding.code} {finding.severity} ", f"bold {colour}"),
                (finding.where, "bold"),
                (f" {file}:{line_of(finding.where)}" if line_of else "", "dim"),
                f": {finding.message}",
            )
        )
        console.print(Text(f"  fix: {finding.fix}", style="green"))


def show_diff(diff: str, *, applied: Iterable[Finding], console: Console) -> None:
    """What `--fix` changed in the stack file, and for which findings."""
    for finding in applied:
        console.print(Text.assemble(("fixed ", "bold green"), (finding.code, "bold"), f" {finding.where}"))
    for line in diff.splitlines()[2:]:
        colour = {"+": "green", "-": "red", "@": "dim"}.get(line[:1], "")
        console.print(Text(f"  {line}", style=colour))
    if diff:
        console.print()


def show_changes(changes: Iterable[Change], *, against: str, console: Console) -> None:
    """What is different from another plan: before, after, and by how much."""
    changes = list(changes)
    console.print(Text(f"\nagainst {against}" + ("" if changes else ": the same plan"), style="bold"))
    if not changes:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("what")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for change in changes:
        share = "" if change.share is None else f"{change.share:+.0%}"
        table.add_row(
            " ".join(filter(None, (change.what, change.unit))), fact(change.before), fact(change.after), share
        )
    console.print(table)


def fact(value: float | str | None) -> str:
    """`–`, `p5.48xlarge`, `16`, `126.83`, `1.2 B`."""
    if value is None or isinstance(value, str):
        return value or "–"
    if abs(value) >= 1e5:
        return count(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3g}"


def money(value: float | None) -> str:
    return "price not known" if value is None else f"{value:,.2f} USD"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if unit != "h" else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def count(value: float) -> str:
    """`950`, `1.8 M`, `42 B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _pools(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("pool", "instance", "nodes", "GPUs at most", "USD/h"):
        table.add_column(name)
    for pool in plan.pools:
        price = "not known" if pool.usd_per_h is None else f"{pool.usd_per_h[0]:,.2f} to {pool.usd_per_h[1]:,.2f}"
        gpus = f"{pool.gpus} {pool.gpu}" if pool.gpu else "none"
        table.add_row(pool.name, pool.instance, f"{pool.nodes[0]} to {pool.nodes[1]}", gpus, price)
    return table


def _elsewhere(plan: Plan) -> list[Text]:
    """Prices of another region than the stack's are said to be that."""
    region = plan.stack.platform.region
    lists = dict.fromkeys(pool.price for pool in plan.pools if pool.usd_per_h and region and region not in pool.price)
    return [Text(f"prices: {of_list}; those of {region} may differ", style="dim") for of_list in lists]


def _chosen(plan: Plan) -> list[Text]:
    """What `auto` became, why, and what came next."""
    lines: list[Text] = []
    for chosen in plan.chosen:
        lines.append(
            Text.assemble(("chose ", "bold green"), (f"{chosen.where}: {chosen.value}", "bold"), f"  {chosen.why}")
        )
        lines += [Text(f"        next: {other}", style="dim") for other in chosen.others]
    return lines


def _training(run: TrainingPlan | None) -> list[RenderableType]:
    if run is None:
        return []
    facts = f"{count(run.parameters)} parameters · {count(run.tokens)} tokens · {run.ranks} ranks on {run.pool}"
    layout = f" · {run.layout}" if run.layout != f"dp {run.ranks}" else ""
    return [
        Text.assemble(("\ntrain ", "bold"), (run.name, "bold cyan"), f"  {facts}{layout}"),
        _bar(run.memory, limit=run.memory_limit_gib, of="a rank"),
        Text(f"  time    about {duration(run.hours.value * 3600)} · {speed(run)} · {money(run.usd)}"),
        *([Text(f"  spot    {spot(run)}")] if run.hours_spot is not None else []),
    ]


def speed(run: TrainingPlan) -> str:
    """`994 k tokens/s · MFU 41%`."""
    return f"{count(run.tokens_per_s)} tokens/s" + (f" · MFU {run.mfu:.0%}" if run.mfu is not None else "")


def spot(run: TrainingPlan) -> str:
    """What spot capacity makes of a run: time, price, interruptions, and how often to save."""
    assert run.hours_spot is not None
    often = (
        f"a checkpoint every {run.best_checkpoint_steps:,} steps ({duration(run.best_checkpoint_s)}) loses the least"
    )
    price = "" if run.usd_spot is None else f" · {money(run.usd_spot)}"
    return f"about {duration(run.hours_spot * 3600)}{price} · {run.interruptions:.2g} interruptions expected · {often}"


def latency(service: ServicePlan) -> str | None:
    """`first token 210 ms, p95 400 ms · each token after it 18 ms, p95 25 ms`; None where no traffic is declared."""
    if service.ttft_p50_s is None or service.ttft_p95_s is None:
        return None
    if service.tpot_p50_s is None or service.tpot_p95_s is None or not service.keeps_up:
        return "does not keep up with its traffic: the queue grows"
    ttft, tpot = (
        f"{short(p50)}, p95 {short(p95)}"
        for p50, p95 in ((service.ttft_p50_s, service.ttft_p95_s), (service.tpot_p50_s, service.tpot_p95_s))
    )
    return f"first token {ttft} · each token after it {tpot}"


def short(seconds: float) -> str:
    """`4.2 ms`, `1.3 s`."""
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.995 else f"{seconds:.2g} s"


def _service(service: ServicePlan) -> list[RenderableType]:
    least, most = service.replicas
    replicas = f"{most} replica{'s' if most > 1 else ''}" if least == most else f"{least} to {most} replicas"
    lines: list[RenderableType] = [
        Text.assemble(("\nserve ", "bold"), (service.name, "bold cyan"), f"  {replicas} on {service.pool}")
    ]
    if service.memory:
        lines.append(_bar(service.memory, limit=service.memory_limit_gib, of="a replica"))
    if service.kv_tokens and service.concurrency:
        held = f"{count(service.kv_tokens)} tokens, {service.concurrency:,.0f} sequences of {service.max_model_len}"
        lines.append(Text(f"  cache   {held}"))
    if said := latency(service):
        lines.append(Text(f"  speed   {said}"))
    price = "" if service.usd_per_h is None else f" · {service.usd_per_h[0]:,.2f} to {service.usd_per_h[1]:,.2f} USD/h"
    output = "" if service.usd_per_mtok is None else f" · {service.usd_per_mtok:,.2f} USD a million output tokens"
    lines.append(Text(f"  start   about {duration(service.load_s)} to load{price}{output}"))
    return lines


def _bar(memory: Estimate, *, limit: float, of: str) -> Text:
    """The memory's parts as a bar of the limit, each with its own fill, and a legend."""
    bar, legend = Text("  memory  "), Text()
    for fill, (part, gib) in zip(FILLS, sorted(memory.parts.items(), key=lambda item: -item[1]), strict=False):
        bar.append(fill * round(WIDTH_OF_BAR * min(gib / limit, 1)), style="cyan")
        legend.append(f"{fill} {part} {gib:.2g}  ", style="dim")
    filled = len(bar.plain) - 10
    bar.append("·" * max(WIDTH_OF_BAR - filled, 0), style="dim")
    over = memory.value > limit
    bar.append(f" {memory.value:.2g} of {limit:.3g} GiB {of} ", style="bold red" if over else "bold")
    return bar + Text("\n          ") + legend
