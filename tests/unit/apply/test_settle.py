"""When a stack is settled: Jobs and Deployments as a real API server reports them."""

from typing import Any

import pytest

from infra.apply import ApiError, Unsettled, settle

Json = dict[str, Any]


class Recorded:
    """A cluster that answers with recorded states or refusals, each once, the last for ever."""

    def __init__(self, *states: Json | ApiError | None) -> None:
        self.states = list(states)

    def find(self, _: Json) -> Json | None:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, ApiError):
            raise state
        return state


def job(**status: Any) -> Json:
    return {"kind": "Job", "metadata": {"name": "train"}, "spec": {"completions": 2}, "status": status}


def deployment(*, generation: int = 2, seen: int = 2, **status: Any) -> Json:
    whole = {"observedGeneration": seen, **status}
    metadata = {"name": "chat", "generation": generation}
    return {"kind": "Deployment", "metadata": metadata, "spec": {"replicas": 2}, "status": whole}


def run(*states: Json | ApiError | None, within_s: float = 30.0) -> list[str]:
    said: list[str] = []
    manifest = next(state for state in states if isinstance(state, dict))
    settle(Recorded(*states), [manifest], within_s=within_s, say=said.append)  # type: ignore[arg-type]
    return said


def test_a_job_is_waited_for_until_it_is_complete() -> None:
    complete = {"type": "Complete", "status": "True"}
    assert run(job(ready=2), job(succeeded=2, conditions=[complete])) == ["waiting for job/train (0/2, 2 running)"]


def test_a_job_that_failed_is_told_at_once() -> None:
    failed = {"type": "Failed", "status": "True", "message": "Container train failed with exit code 2"}
    with pytest.raises(Unsettled, match="job/train failed: Container train failed with exit code 2"):
        run(job(conditions=[failed]))


def test_a_deployment_is_ready_when_only_new_pods_are_left() -> None:
    ready = {"replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}
    assert run(deployment(seen=1, **ready), deployment(**ready)) == ["waiting for deployment/chat (2/2 ready)"]
    surging = ready | {"replicas": 3}
    with pytest.raises(Unsettled, match="not settled within 0 s"):
        run(deployment(**surging), within_s=0)


def test_a_roll_out_without_progress_is_told() -> None:
    stuck = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "timed out"}
    with pytest.raises(Unsettled, match="makes no progress"):
        run(deployment(conditions=[stuck]))


def test_an_object_that_is_gone_is_told() -> None:
    with pytest.raises(Unsettled, match="gone"):
        run(None, job(), within_s=0)


def test_an_api_server_that_is_away_for_a_while_is_asked_again() -> None:
    complete = {"type": "Complete", "status": "True"}
    away = ApiError("https://api does not answer", status=0)
    assert run(away, job(succeeded=2, conditions=[complete])) == ["waiting for https://api does not answer"]
    with pytest.raises(Unsettled, match="does not answer"):
        run(away, job(), within_s=0)
    with pytest.raises(ApiError, match="forbidden"):
        run(ApiError("jobs is forbidden", status=403), job())
