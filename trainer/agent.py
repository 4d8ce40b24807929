# pyright: reportCallIssue=false, reportIncompatibleVariableOverride=false
"""torchrun's agent of one node, but one that knows how the trainer's ranks end.

torchrun takes every exit code for a failure and starts the ranks again. Where one node of a gang is told to go, all ranks
write the checkpoint and exit 75: the other nodes' agents would meet again in a rendezvous that still counts the one that
has gone. They end instead, and whoever started them starts all again: no restart is used up.
"""

from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousError

from trainer.errors import INTERRUPTED, Interrupted

LOST = (RendezvousError, DistError)
"""What is raised where the rendezvous, or a node that is counted in it, has gone."""


class Agent(LocalElasticAgent):
    """Raises Interrupted where its ranks ended so, unless a node waits to join: they start again with that one."""

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            return super().run(role)
        except LOST:
            # The node that keeps the rendezvous may be the one that was told to go, and gone before our ranks had ended.
            group = self.get_worker_group()
            if group.state == WorkerState.HEALTHY and _interrupted(super()._monitor_workers(group)):
                raise Interrupted("the ranks were stopped, and the rendezvous has ended") from None
            raise

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if not _interrupted(result):
            return result
        if self._somebody_waits():  # another agent saw that first, and stopped its ranks; ours have ended with them
            return RunResult(state=WorkerState.HEALTHY)
        raise Interrupted("the ranks were stopped")

    def _somebody_waits(self) -> bool:
        try:
            return self._rdzv_handler.num_nodes_waiting() > 0
        except LOST:
            return False


def _interrupted(result: RunResult) -> bool:
    return any(failure.exitcode == INTERRUPTED for failure in result.failures.values())
