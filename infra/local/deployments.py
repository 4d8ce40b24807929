"""A Deployment: its replicas, replaced by maxSurge and maxUnavailable when the pod template has changed."""

import asyncio

from infra.local.objects import ManifestError, Workload, digest, int_or_percent, section
from infra.local.pod import Host, Pod, PodExit
from infra.local.status import WorkloadStatus

# A pod that starts so often without becoming ready is told of as a failure to whoever waits for it.
_CRASHES_UNTIL_FAILED = 3
_LOOK_AGAIN_S = 5.0


class DeploymentController:
    """Keeps one Deployment as its manifest says, in the task that `run` is."""

    def __init__(self, workload: Workload, *, host: Host, published: dict[int, int]) -> None:
        self._host = host
        self._pods: dict[int, tuple[Pod, asyncio.Task[PodExit]]] = {}
        self._wake = asyncio.Event()
        self._refused = ""
        self.update(workload, published=published)

    @property
    def pods(self) -> list[Pod]:
        return [pod for pod, _ in self._pods.values()]

    @property
    def settled(self) -> bool:
        """Every replica ready, and of the present template; none too many."""
        return len(self.pods) == self.workload.count and all(p.ready and self._is_new(p) for p in self.pods)

    @property
    def failed(self) -> tuple[str, int] | None:
        """Why, and the exit code, when no patience will make it ready: it refuses what it was given, or it crash-loops."""
        if any(p.ready and self._is_new(p) for p in self.pods):
            return None
        for pod in self.pods:
            failing = pod.failing
            if self._is_new(pod) and failing and (failing.exit_code == 2 or pod.restarts >= _CRASHES_UNTIL_FAILED):
                return f"{self.workload.key} failed: {pod.describe(failing)}", 2 if failing.exit_code == 2 else 1
        return None

    def status(self) -> WorkloadStatus:
        pods = [p.status() for p in self.pods]
        live = [p for p in pods if p.state != "Stopping"]
        if self.settled:
            state, reason = "Ready", ""
        else:
            state = "Running" if any(p.state in ("Running", "Ready") for p in live) else "Waiting"
            waiting = self._refused or ("rolling out" if pods else "waiting to start")
            reason = next((p.reason for p in live if p.reason), waiting)
        return WorkloadStatus(
            kind="Deployment",
            name=self.workload.name,
            state=state,
            reason=reason,
            ready=sum(p.state == "Ready" for p in pods),
            wanted=self.workload.count,
            restarts=sum(p.restarts for p in pods),
            exit_code=next((p.exit_code for p in pods if p.exit_code), None),
            pods=pods,
        )

    def update(self, workload: Workload, *, published: dict[int, int]) -> None:
        """Take over a new manifest and the ports that it is published at; what they change is rolled out."""
        self.workload, self._published = workload, published
        self._template = digest([workload.template, sorted(published.items())])
        self._wake.set()

    def wake(self) -> None:
        """Something may have become ready, or ended."""
        self._wake.set()

    async def run(self) -> None:
        """Reconcile until cancelled; then stop the pods gracefully."""
        try:
            while True:
                self._wake.clear()
                self._step()
                await self._wake.wait()
        finally:
            for pod in self.pods:
                pod.stop()
            if self._pods:
                await asyncio.wait({task for _, task in self._pods.values()})

    def _is_new(self, pod: Pod) -> bool:
        return pod.template == self._template

    def _step(self) -> None:
        """One look at the pods: start and stop as many as the roll-out allows now."""
        self._pods = {slot: (pod, task) for slot, (pod, task) in self._pods.items() if not task.done()}
        live = [p for p in self.pods if not p.stopping]
        old = [p for p in live if not self._is_new(p)]
        new = [p for p in live if self._is_new(p)]
        wanted = self.workload.count
        surge, unavailable = self._roll_out_limits()
        for pod in new[wanted:]:
            pod.stop()
        # Old pods that are not ready serve no one and go first; ready ones while enough others stay.
        spare = sum(p.ready for p in live) - (wanted - unavailable)
        for pod in sorted(old, key=lambda p: p.ready):
            if pod.ready and spare <= 0:
                break
            spare -= pod.ready
            pod.stop()
        if self._recreates and any(not self._is_new(p) for p in self.pods):
            return
        # A pod that is stopping still holds its slot, and, as in Kubernetes, does not count against the surge.
        live = [p for p in live if not p.stopping]
        start = min(wanted - min(len(new), wanted), wanted + surge - len(live))
        for _ in range(start):
            if not self._start():
                break

    def _start(self) -> bool:
        """Start a pod in the lowest free slot. False: what a LoadBalancer publishes has only its own slots."""
        slot = next(s for s in range(len(self._pods) + 1) if s not in self._pods)
        if self._published and slot >= self.workload.count:
            return False
        try:
            plan = self._host.planner.pod(self.workload, slot)
        except ManifestError as error:  # a Secret of the user's has gone since
            self._refused = str(error)
            self._host.changed()
            asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self.wake)
            return False
        self._refused = ""
        pod = Pod(plan, template=self._template, host=self._host)
        task = pod.start()
        self._pods[slot] = (pod, task)
        task.add_done_callback(self._on_end)
        return True

    def _on_end(self, task: asyncio.Task[PodExit]) -> None:
        error = None if task.cancelled() else task.exception()
        if error:
            print(f"{self.workload.key}: {error!r}", flush=True)
        # A pod that could not be set up, on a full disk for one, is not tried in a tight loop.
        asyncio.get_running_loop().call_later(_LOOK_AGAIN_S if error else 0.0, self.wake)

    @property
    def _recreates(self) -> bool:
        return section(self.workload.spec, "strategy").get("type") == "Recreate"

    def _roll_out_limits(self) -> tuple[int, int]:
        """maxSurge and maxUnavailable as counts, by Kubernetes' rules (25 % each by default, never both 0)."""
        wanted = self.workload.count
        if self._recreates:
            return 0, wanted
        rolling = section(self.workload.spec, "strategy", "rollingUpdate")
        surge = int_or_percent(rolling.get("maxSurge", "25%"), of=wanted, round_up=True)
        unavailable = int_or_percent(rolling.get("maxUnavailable", "25%"), of=wanted, round_up=False)
        if self._published:
            # The published port is one: its next holder starts when the last has left.
            return 0, max(1, unavailable)
        return surge, unavailable if surge or unavailable else 1
