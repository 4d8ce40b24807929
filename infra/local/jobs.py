"""A Job: its pods by completion index, tried again as backoffLimit and podFailurePolicy say."""

import asyncio
from typing import cast

from infra.local.objects import Json, ManifestError, Workload, digest, entries, section
from infra.local.pod import Host, Pod, PodExit, back_off_s
from infra.local.status import WorkloadStatus


class JobFailedError(Exception):
    """The Job has failed for good. `code`: 2 when the container refused (another try would fail alike), else 1."""

    def __init__(self, why: str, code: int) -> None:
        super().__init__(why)
        self.code = code


class JobController:
    """Runs one Job to its end, in the task that `run` is."""

    def __init__(self, workload: Workload, *, host: Host, complete: bool = False) -> None:
        self.workload = workload
        self._host = host
        self._pods: dict[int, Pod] = {}
        self._failures = 0
        self._restarts = 0
        self._failed_indexes: dict[int, JobFailedError] = {}
        self._succeeded = workload.count if complete else 0
        self._why_waiting = "waiting to start"
        self.complete = complete
        self.failed: JobFailedError | None = None

    @property
    def pods(self) -> list[Pod]:
        return list(self._pods.values())

    @property
    def settled(self) -> bool:
        """Whether nothing more is to be waited for."""
        return self.complete or bool(self.workload.spec.get("suspend"))

    def status(self) -> WorkloadStatus:
        pods = [p.status() for p in self.pods]
        if self.complete:
            state, reason = "Complete", ""
        elif self.failed:
            state, reason = "Failed", str(self.failed)
        elif self.workload.spec.get("suspend"):
            state, reason = "Waiting", "suspended"
        else:
            running = any(p.state in ("Running", "Ready") for p in pods)
            state = "Running" if running else "Waiting"
            why = "" if running else self._why_waiting
            reason = next((p.reason for p in pods if p.reason and p.state != "Complete"), why)
        return WorkloadStatus(
            kind="Job",
            name=self.workload.name,
            state=state,
            reason=reason,
            ready=self._succeeded,
            wanted=self.workload.count,
            restarts=self._restarts + sum(p.restarts for p in self.pods),
            exit_code=0 if self.complete else self.failed.code if self.failed else None,
            pods=pods,
        )

    async def run(self) -> None:
        """Complete, or set `failed`. Cancelling it stops the pods gracefully."""
        if self.settled:
            return
        try:
            async with asyncio.timeout(self.workload.spec.get("activeDeadlineSeconds")):
                await self._run_indexes()
            self.complete = True
        except* JobFailedError as group:
            self.failed = cast("JobFailedError", group.exceptions[0])
        except* TimeoutError:
            self.failed = JobFailedError(f"{self.workload.key} ran past its activeDeadlineSeconds", 1)
        finally:
            self._host.changed()

    async def _run_indexes(self) -> None:
        at_once = asyncio.Semaphore(self.workload.spec.get("parallelism", 1) or 1)
        async with asyncio.TaskGroup() as group:
            for index in range(self.workload.count):
                group.create_task(self._run_index(index, at_once))
        if self._failed_indexes:
            raise next(iter(self._failed_indexes.values()))

    async def _run_index(self, index: int, at_once: asyncio.Semaphore) -> None:
        """Pods of one index, one after another, until one succeeds or the index is given up."""
        failures = 0
        async with at_once:
            while True:
                ended = await self._run_pod(index)
                if ended.code == 0:
                    self._succeeded += 1
                    return
                action = failure_action(section(self.workload.spec, "podFailurePolicy"), ended)
                code = 2 if ended.code == 2 else 1
                if action == "FailJob":
                    raise JobFailedError(f"{self.workload.key} failed: {ended.why}", code)
                failures += action != "Ignore"
                if action == "FailIndex" or self._index_is_lost(failures):
                    self._give_up(index, f"{self.workload.key} failed at index {index}: {ended.why}", code)
                    return
                self._count_failure(action, ended, code)
                delay_s = back_off_s(max(1, failures))
                self._why_waiting = f"starting again in {delay_s:g} s: {ended.why}"
                self._host.changed()
                await asyncio.sleep(delay_s)

    async def _run_pod(self, index: int) -> PodExit:
        try:
            plan = self._host.planner.pod(self.workload, index)
        except ManifestError as error:  # a Secret of the user's has gone since
            raise JobFailedError(str(error), 2) from None
        if index in self._pods:
            self._restarts += self._pods[index].restarts + 1
        pod = self._pods[index] = Pod(plan, template=digest(self.workload.template), host=self._host)
        task = pod.start()
        watching = asyncio.create_task(self._watch_restarts(pod)) if plan.restart_policy == "OnFailure" else None
        try:
            await asyncio.wait({task, *([watching] if watching else [])}, return_when="FIRST_COMPLETED")
            if watching and watching.done():
                watching.result()
        finally:
            if watching:
                watching.cancel()
            pod.stop()
            await asyncio.wait({task})
        return task.result()

    async def _watch_restarts(self, pod: Pod) -> None:
        """With restartPolicy OnFailure a container restarts in its pod, and each restart counts against backoffLimit."""
        while True:
            failing = pod.failing
            if failing and pod.restarts >= self.workload.spec.get("backoffLimit", 6):
                code = 2 if failing.exit_code == 2 else 1
                raise JobFailedError(f"{self.workload.key} failed: {pod.describe(failing)}", code)
            await asyncio.sleep(0.1)

    def _index_is_lost(self, failures: int) -> bool:
        limit = self.workload.spec.get("backoffLimitPerIndex")
        return limit is not None and failures > limit

    def _give_up(self, index: int, why: str, code: int) -> None:
        """One index has failed for good; the others go on while there may be failed ones."""
        self._failed_indexes[index] = JobFailedError(why, code)
        allowed = self.workload.spec.get("maxFailedIndexes")
        if allowed is not None and len(self._failed_indexes) > allowed:
            raise self._failed_indexes[index]

    def _count_failure(self, action: str, ended: PodExit, code: int) -> None:
        self._failures += action != "Ignore"
        # With a limit by index, the Job's own is by default without end.
        default = 6 if self.workload.spec.get("backoffLimitPerIndex") is None else 2**31 - 1
        limit = self.workload.spec.get("backoffLimit", default)
        if self._failures > limit:
            raise JobFailedError(f"{self.workload.key} failed {self._failures} times: {ended.why}", code)


def failure_action(policy: Json, ended: PodExit) -> str:
    """FailJob, FailIndex, Ignore or Count: the first rule of a podFailurePolicy that matches decides."""
    for rule in entries(policy, "rules"):
        on: Json | None = rule.get("onExitCodes")
        if on is None:
            continue  # onPodConditions: nothing evicts a pod here
        codes = [c for name, c in ended.codes.items() if c and on.get("containerName", name) == name]
        if any((code in on["values"]) == (on["operator"] == "In") for code in codes):
            return rule["action"]
    return "Count"
