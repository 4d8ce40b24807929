"""Replicas that train apart, each a launch of its own: one may die and return, and the others go on.

Between two averages a replica knows of no other. Where they average, those who are there make a group for this one round;
the round counts for all or for none (`meeting.py`). Whoever comes without having trained with the others, at the start
or after a death, gets weights, moments and the outer state from one that has.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, BroadcastOptions, PrefixStore, ProcessGroupGloo  # pyright: ignore[reportPrivateImportUsage]

from trainer.config import LocalSgdConfig
from trainer.errors import Failed, Refused
from trainer.local_sgd import LocalSgd, local
from trainer.log import Log
from trainer.meeting import MeetingPlace, Round, connect
from trainer.parallel.ranks import Ranks
from trainer.state import prepare_moments
from trainer.watchdog import Watchdog

_ASK_AGAIN_S = 0.05
T = TypeVar("T")


def which_replica(config: LocalSgdConfig) -> int:
    """What REPLICA says. Raises Refused where it is not a number below `launches`, or nobody said where to meet."""
    said, launches = os.environ.get("REPLICA", ""), config.launches or 0
    if not said.isdigit() or int(said) >= launches:
        fix = f"Set REPLICA to a number from 0 to {launches - 1}, another for each launch."
        raise Refused(f"local_sgd.launches {launches} need to know which of them this is", where="REPLICA", fix=fix)
    if not os.environ.get("MEETING_ENDPOINT"):
        fix = "Set MEETING_ENDPOINT to the host:port of python -m trainer.meeting."
        raise Refused("replicas that are launches of their own need a place to meet", where="MEETING_ENDPOINT", fix=fix)
    return int(said)


class MeetingSgd(LocalSgd):
    """The outer optimizer of one such replica. `purpose` is equal for all who train the same in the same layout."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        *,
        optimizer: torch.optim.Optimizer,
        config: LocalSgdConfig,
        purpose: str,
        ranks: Ranks,
        watchdog: Watchdog,
        timeout_s: float,
        log: Log,
    ) -> None:
        super().__init__(parameters, config=config, group=None, replicas=1)
        prepare_moments(optimizer)
        self._optimizer, self._purpose, self._ranks = optimizer, purpose, ranks
        self._watchdog, self._timeout_s, self._log = watchdog, timeout_s, log
        assert config.launches is not None
        self._endpoint = os.environ["MEETING_ENDPOINT"]
        self._place = MeetingPlace(
            self._endpoint,
            purpose=purpose,
            replica=ranks.launch,
            replicas=config.launches,
            lost_after_s=config.lost_after_s,
            patience_s=timeout_s,
        )
        self._life = ranks.from_first(self._place.life)

    def join(self, step: int) -> int:
        if self._ranks.first:
            self._place.open()
        return self._meet(step, until=lambda _met: True)

    def leave(self) -> None:
        self._place.leave()

    def after_step(self, done: int) -> int:
        due = next((fragment for fragment in range(len(self._names)) if self._is_due(fragment, done)), None)
        return done if due is None else self._meet(done, fragment=due, until=self._is_part_of)

    def finish(self, done: int) -> int:
        for fragment in range(len(self._names)):
            done = self._meet(done, fragment=fragment, final=True, until=self._is_part_of)
        return done

    def _is_part_of(self, met: Round) -> bool:
        """Whether this replica's training counted in a round, or it has another's."""
        return met.averaged > 0

    def _meet(self, step: int, *, fragment: int = 0, final: bool = False, until: Callable[[Round], bool]) -> int:
        """Meets until a round has gone well that is what it is to be; returns the step that this replica is at then."""
        while True:
            met = self._answer(partial(self._place.come, step=step, fragment=fragment, final=final))
            told = any(guest.life == self._life for guest in met.told)
            summed = self._exchange(met, told=told)
            well = self._ranks.sum(torch.tensor(float(summed is not None))).item() == self._ranks.world
            well = self._answer(partial(self._place.settle, met, well=well))
            if not well and told:  # half of another's state is in the place of this one's
                fix = "Start again: it joins the others, or goes on from its checkpoint."
                raise Failed("the replica that told this one its state has gone", where="local_sgd", fix=fix)
            if not well:
                continue
            if told:
                step = met.source.step
                self._how_far(met.source.fragment)  # nothing yet, from the weights that it was told
                self._log.emit("joined", step=step, replica=met.source.replica)
            if summed is not None and met.averaged:
                self._replicas = met.averaged
                self._note_sum(met.source.fragment, summed)
                self._take_in(met.source.fragment)
            if until(met):
                return step

    def _answer(self, ask: Callable[[], T | None]) -> T:
        """What the first rank is answered, on every rank, however long it takes."""
        while True:
            answer = self._ranks.from_first(ask() if self._ranks.first else None)
            self._watchdog.beat()
            if answer is not None:
                return answer
            time.sleep(_ASK_AGAIN_S)

    def _exchange(self, met: Round, *, told: bool) -> Tensor | None:
        """The state for those who have none, then the sum over all of what they learnt; None where that failed."""
        me = next(guest for guest in met.guests if guest.life == self._life)
        bucket = self._how_far(met.source.fragment if met.averaged else 0).cpu()
        if me.new:
            bucket.zero_()
        if len(met.guests) == 1:
            return bucket
        try:
            group = self._group_of(met)
            if met.told:
                self._tell(group, root=met.guests.index(met.source), told=told)
            options = AllreduceOptions()
            options.timeout = timedelta(seconds=self._timeout_s)
            group.allreduce([bucket], options).wait()
        except RuntimeError as error:  # a replica that dies takes its connections with it
            self._log.emit("round_failed", level="warning", step=me.step, message=str(error).splitlines()[0])
            return None
        return bucket

    def _tell(self, group: Any, *, root: int, told: bool) -> None:
        """The state of guest number `root` to those who are to be told."""
        options = BroadcastOptions()
        options.rootRank, options.timeout = root, timedelta(seconds=self._timeout_s)
        for tensor in self._whole_state():
            passed = tensor.to("cpu", copy=True)  # who needs no telling hears it all the same
            group.broadcast([passed], options).wait()
            if told:
                tensor.copy_(passed)

    def _group_of(self, met: Round) -> Any:
        """The ranks like this one in every replica of a round, which meet soon or not at all."""
        store = PrefixStore(f"{met.number}/{self._ranks.rank}", connect(self._endpoint, self._purpose))
        own = [guest.life for guest in met.guests].index(self._life)
        return ProcessGroupGloo(store, own, len(met.guests), timedelta(seconds=2 * self._config.lost_after_s))

    def _whole_state(self) -> list[Tensor]:
        """All that a replica knows but for its place in the data, in an order that is everyone's."""
        moments = [
            value
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            for _, value in sorted(self._optimizer.state[parameter].items())
        ]
        kinds = (self._parameters, self._before, self._momentum)
        return [local(tensor) for tensor in [*(one for kind in kinds for one in kind.values()), *moments]]
