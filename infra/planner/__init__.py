"""Pure functions from spec × catalogue to estimates. Imports neither Pulumi nor torch."""

from infra.planner.estimate import Estimate
from infra.planner.inference import ServicePlan
from infra.planner.plan import Plan, PoolPlan, plan, to_json
from infra.planner.resolve import Chosen, resolve
from infra.planner.training import TrainingPlan

__all__ = ["Chosen", "Estimate", "Plan", "PoolPlan", "ServicePlan", "TrainingPlan", "plan", "resolve", "to_json"]
