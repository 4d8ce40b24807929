"""The page of a plan: what it costs, whether it fits, what to change."""

from collections.abc import Sequence
from importlib.resources import files
from string import Template

from infra.checks import Finding
from infra.cli.against import Change
from infra.cli.report.charts import memory_bar, part_bar, range_bars
from infra.cli.report.html import Html, join, table, tag
from infra.cli.show import count, duration, fact, latency, money, spot
from infra.planner import Estimate, Plan, PoolPlan, ServicePlan, TrainingPlan

HOURS_A_MONTH = 730


def page(
    plan: Plan, findings: Sequence[Finding], *, stack: str, changes: Sequence[Change] | None, against: str | None
) -> str:
    """HTML of one page. The same plan gives the same bytes."""
    template = Template(files("infra.cli.report").joinpath("page.html").read_text(encoding="utf-8"))
    parts = [
        _head(plan, findings, stack=stack),
        _findings(findings),
        _changes(changes, against=against) if changes is not None else Html(),
        _chosen(plan),
        _cost(plan),
        _training(plan.training) if plan.training else Html(),
        *(_service(service) for service in plan.services),
        _assumptions(plan),
    ]
    return template.substitute(title=tag("title", f"Slipway plan: {stack}"), body=join(*parts))


def _head(plan: Plan, findings: Sequence[Finding], *, stack: str) -> Html:
    errors = sum(finding.severity == "error" for finding in findings)
    warnings = len(findings) - errors
    verdict = f"refused: {errors} error{'s' if errors > 1 else ''}" if errors else "fits"
    if warnings:
        verdict += f", {warnings} warning{'s' if warnings > 1 else ''}"
    state = "error" if errors else "warn" if warnings else "good"
    title = tag("header", tag("h1", "Plan of ", tag("em", stack)), tag("span", verdict, class_=f"verdict {state}"))
    return join(title, tag("div", *_tiles(plan), class_="tiles"))


def _tiles(plan: Plan) -> list[Html]:
    most = plan.usd_per_h
    gpus = sum(pool.gpus for pool in plan.pools)
    tiles = [
        _tile("at full scale", "not known" if most is None else f"{most:,.2f}", "USD/h"),
        _tile("GPUs at most", f"{gpus}", ""),
    ]
    if plan.training:
        tiles.append(_tile("training", duration(plan.training.hours.value * 3600), ""))
        tiles.append(_tile("a run", fact(plan.training.usd), "USD"))
    if plan.services:
        replicas = [sum(service.replicas[end] for service in plan.services) for end in (0, 1)]
        tiles.append(_tile("replicas", _range(replicas[0], replicas[1]), ""))
    return tiles


def _tile(name: str, value: str, unit: str) -> Html:
    return tag("div", tag("span", name), tag("strong", value, " ", tag("small", unit)), class_="tile")


def _findings(findings: Sequence[Finding]) -> Html:
    if not findings:
        return Html()
    items = [
        tag(
            "li",
            tag("p", tag("b", finding.code), " ", tag("code", finding.where), ": ", finding.message),
            tag("p", tag("b", "Fix"), " ", finding.fix, class_="fix"),
            class_=finding.severity,
        )
        for finding in findings
    ]
    return tag("section", tag("h2", "Findings"), tag("ul", *items, class_="findings"))


def _changes(changes: Sequence[Change], *, against: str | None) -> Html:
    rows = [
        (
            " ".join(filter(None, (change.what, change.unit))),
            fact(change.before),
            fact(change.after),
            "" if change.share is None else f"{change.share:+.0%}",
        )
        for change in changes
    ]
    inside = table(("what", "before", "after", "change"), rows) if rows else tag("p", "The same plan.")
    return tag("section", tag("h2", "Against ", tag("code", against or "")), inside)


def _cost(plan: Plan) -> Html:
    bars = [
        (pool.name, *pool.usd_per_h, f"{_range(*pool.usd_per_h, form=',.2f')} USD/h")
        for pool in plan.pools
        if pool.usd_per_h
    ]
    heads = ("pool", "instance", "nodes", "GPUs at most", "USD/h", "USD a month at most")
    rows = [_pool(pool) for pool in plan.pools]
    key = tag(
        "ul",
        tag("li", tag("span", class_="key least"), "always there"),
        tag("li", tag("span", class_="key most"), "at full scale"),
        class_="legend",
    )
    chart = tag("div", range_bars(bars), key, class_="chart") if any(most for _, _, most, _ in bars) else Html()
    return tag("section", tag("h2", "Pools and cost"), chart, table(heads, rows, numbers_from=2))


def _pool(pool: PoolPlan) -> tuple[str, ...]:
    gpus = f"{pool.gpus} {pool.gpu}" if pool.gpu else "none"
    nodes = _range(*pool.nodes)
    if pool.usd_per_h is None:
        return pool.name, pool.instance, nodes, gpus, "not known", "not known"
    month = f"{pool.usd_per_h[1] * HOURS_A_MONTH:,.0f}"
    return pool.name, pool.instance, nodes, gpus, _range(*pool.usd_per_h, form=",.2f"), month


def _training(run: TrainingPlan) -> Html:
    rows = [
        ("time", f"about {duration(run.hours.value * 3600)}"),
        ("price on demand", money(run.usd)),
        ("speed", f"{count(run.tokens_per_s)} tokens/s"),
        ("MFU, HFU", "not known" if run.mfu is None else f"{run.mfu:.0%}, {run.hfu or run.mfu:.0%}"),
        ("parameters", count(run.parameters)),
        ("tokens", count(run.tokens)),
        ("ranks", f"{run.ranks} on {run.pool}, {run.layout}"),
    ]
    step = {part: seconds for part, seconds in run.step.parts.items() if seconds > 0}
    parts = [_memory(run.memory, run.memory_limit_gib, "rank"), _facts(rows)]
    if len(step) > 1:
        parts.insert(1, join(tag("h3", f"A step: {run.step.value:.3g} s"), part_bar(step, form=".3g", unit="s")))
    if run.hours_spot is not None:
        parts.append(tag("p", tag("b", "On spot"), " ", spot(run), class_="note"))
    return tag("section", tag("h2", "Train ", tag("em", run.name)), *parts)


def _service(service: ServicePlan) -> Html:
    rows = [("replicas", f"{_range(*service.replicas)} on {service.pool}")]
    if service.kv_tokens is not None and service.concurrency is not None:
        rows.append(("cache", f"{count(service.kv_tokens)} tokens"))
        rows.append(("at once", f"{service.concurrency:,.0f} sequences of {service.max_model_len} tokens"))
    rows.append(("time to load", f"about {duration(service.load_s)}"))
    if service.usd_per_h:
        rows.append(("price", f"{_range(*service.usd_per_h, form=',.2f')} USD/h"))
    if service.usd_per_mtok is not None:
        rows.append(("a million output tokens", f"{service.usd_per_mtok:,.2f} USD"))
    said = latency(service)
    speed = tag("p", tag("b", "Under its traffic"), " ", said, class_="note") if said else Html()
    memory = _memory(service.memory, service.memory_limit_gib, "replica") if service.memory else Html()
    return tag("section", tag("h2", "Serve ", tag("em", service.name)), memory, _facts(rows), speed)


def _chosen(plan: Plan) -> Html:
    """What `auto` became, why, and what came next."""
    items = [
        tag(
            "li",
            tag("p", tag("code", chosen.where), " ", tag("b", chosen.value), " ", chosen.why),
            *(tag("p", f"next: {other}", class_="soft") for other in chosen.others),
            class_="good",
        )
        for chosen in plan.chosen
    ]
    return tag("section", tag("h2", "Chosen"), tag("ul", *items, class_="findings")) if items else Html()


def _memory(memory: Estimate, limit_gib: float, of: str) -> Html:
    said = f"Memory of a {of}: {memory.value:.1f} of {limit_gib:.1f} GiB"
    bar = memory_bar(memory.parts, limit_gib=limit_gib, value_gib=memory.value)
    return join(tag("h3", said, class_="over" if memory.value > limit_gib else ""), bar)


def _facts(rows: Sequence[tuple[str, str]]) -> Html:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows))


def _assumptions(plan: Plan) -> Html:
    estimates = [plan.training.memory, plan.training.hours, plan.training.step] if plan.training else []
    estimates += [service.memory for service in plan.services if service.memory]
    said = dict.fromkeys(text for estimate in estimates for text in estimate.assumptions)
    prices = dict.fromkeys(f"prices of {pool.instance}: {pool.price}" for pool in plan.pools)
    items = [tag("li", text) for text in [*said, *prices]]
    return tag("details", tag("summary", "Assumptions and sources"), tag("ul", *items))


def _range(least: float, most: float, *, form: str = "") -> str:
    return f"{least:{form}}" if least == most else f"{least:{form}} to {most:{form}}"
