"""`slipway plan --against`: what a change of a stack file changes in cost, time, memory and capacity."""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.cli.project import Refusal, planned, root
from infra.planner import Plan, ServicePlan, TrainingPlan
from infra.spec import StackError

Fact = int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Change:
    what: str
    """`training.hours`, `services.chat.replicas at most`."""
    unit: str
    before: Fact
    after: Fact

    @property
    def share(self) -> float | None:
        """Relative change of two numbers; None where there is none to tell."""
        if isinstance(self.before, int | float) and isinstance(self.after, int | float) and self.before:
            return self.after / self.before - 1
        return None

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "unit": self.unit, "before": self.before, "after": self.after}


def changes(before: Plan, after: Plan) -> list[Change]:
    """What differs, in the order of the plan that is wanted, then what is gone."""
    old, new = facts(before), facts(after)
    return [
        Change(what=what, unit=unit, before=old.get((what, unit)), after=new.get((what, unit)))
        for what, unit in dict.fromkeys([*new, *old])
        if old.get((what, unit)) != new.get((what, unit))
    ]


def facts(plan: Plan) -> dict[tuple[str, str], Fact]:
    """Everything of a plan that can be compared, by name and unit."""
    prices = [pool.usd_per_h for pool in plan.pools]
    known = [price for price in prices if price]
    found: dict[tuple[str, str], Fact] = {
        ("cost at least", "USD/h"): sum(price[0] for price in known) if len(known) == len(prices) else None,
        ("cost at most", "USD/h"): plan.usd_per_h,
        ("GPUs at most", ""): sum(pool.gpus for pool in plan.pools),
    }
    for pool in plan.pools:
        found[f"pools.{pool.name}.instance", ""] = pool.instance
        found[f"pools.{pool.name}.nodes at most", ""] = pool.nodes[1]
    if plan.training:
        found |= {(f"training.{what}", unit): value for (what, unit), value in _training(plan.training).items()}
    for service in plan.services:
        own = _service(service)
        found |= {(f"services.{service.name}.{what}", unit): value for (what, unit), value in own.items()}
    return found


def _training(run: TrainingPlan) -> dict[tuple[str, str], Fact]:
    return {
        ("parameters", ""): run.parameters,
        ("tokens", ""): run.tokens,
        ("ranks", ""): run.ranks,
        ("layout", ""): run.layout,
        ("time", "h"): run.hours.value,
        ("time on spot", "h"): run.hours_spot,
        ("cost of a run", "USD"): run.usd,
        ("cost of a run on spot", "USD"): run.usd_spot,
        ("speed", "tokens/s"): run.tokens_per_s,
        ("memory of a rank", "GiB"): run.memory.value,
    }


def _service(service: ServicePlan) -> dict[tuple[str, str], Fact]:
    return {
        ("replicas at least", ""): service.replicas[0],
        ("replicas at most", ""): service.replicas[1],
        ("memory of a replica", "GiB"): service.memory.value if service.memory else None,
        ("cache", "tokens"): service.kv_tokens,
        ("sequences at once", ""): service.concurrency,
        ("time to load", "s"): service.load_s,
        ("first token p95", "s"): service.ttft_p95_s,
        ("token p95", "s"): service.tpot_p95_s,
        ("cost of output", "USD/Mtok"): service.usd_per_mtok,
        ("cost at most", "USD/h"): service.usd_per_h[1] if service.usd_per_h else None,
    }


def plan_of(reference: str, *, stack: str) -> Plan:
    """The plan of the same stack in another folder or at a Git revision. Raises Refusal where there is none."""
    folder = Path(reference)
    if folder.is_dir():
        name = f"Pulumi.{stack}.yaml"
        there = [path for path in (folder / name, folder / "stacks" / name) if path.is_file()]
        if not there:
            raise Refusal(f"no {name} in it or its stacks/ ({folder}). Fix: name a folder that has the stack")
        return planned(there[0])
    return _at_revision(reference, stack=stack)


def _at_revision(revision: str, *, stack: str) -> Plan:
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit.returncode:
        raise Refusal(f"neither a folder nor a Git revision ({revision}). Fix: --against main, or a folder")
    name = f"stacks/Pulumi.{stack}.yaml"
    shown = _git("show", f"{commit.stdout.decode().strip()}:./{name}")
    if shown.returncode:
        raise Refusal(f"{name} is not there ({revision}). Fix: compare with a revision that has the stack")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(name).name
        file.write_bytes(shown.stdout)
        try:
            return planned(file)
        except StackError as error:
            raise Refusal(str(error).replace(str(file), f"{revision}:{name}")) from None


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", "-C", str(root()), *arguments], capture_output=True)  # noqa: S603, S607
    except FileNotFoundError:
        raise Refusal("git is not on PATH. Fix: install it, or compare with a folder") from None
