"""SLW7xx: what it costs against what it may cost."""

from collections.abc import Iterator

from infra.checks.finding import Finding
from infra.planner import Plan
from infra.spec import Stack


def within_budget(stack: Stack, plan: Plan) -> Iterator[Finding]:
    """SLW701: nodes at full scale against `budget.usd_per_h`; SLW702: a run against `budget.usd_per_run`; SLW703: no price known."""
    budget = stack.budget
    if budget.usd_per_h is not None and plan.usd_per_h is not None and plan.usd_per_h > budget.usd_per_h:
        yield Finding(
            code="SLW701",
            severity="error",
            where="budget.usd_per_h",
            message=f"all pools at their fullest cost {plan.usd_per_h:.2f} USD/h, and the budget is {budget.usd_per_h:.2f}",
            fix="lower a pool's max_nodes, or raise the budget",
        )
    usd = plan.training.usd if plan.training else None
    if budget.usd_per_run is not None and usd is not None and usd > budget.usd_per_run:
        yield Finding(
            code="SLW702",
            severity="error",
            where="budget.usd_per_run",
            message=f"a training run costs about {usd:.0f} USD on demand, and the budget is {budget.usd_per_run:.0f}",
            fix="fewer steps, a cheaper instance, or a larger budget",
        )
    if budget != type(budget)() and plan.usd_per_h is None:
        names = ", ".join(pool.instance for pool in plan.pools if pool.usd_per_h is None)
        yield Finding(
            code="SLW703",
            severity="warn",
            where="budget",
            message=f"the catalogue has no price of {names}, so the budget cannot be held",
            fix="add the price to a TOML file that $SLIPWAY_CATALOG names",
        )
