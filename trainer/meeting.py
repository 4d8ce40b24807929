"""Where replicas meet that come and go: who takes part in a round, and whether it counted, are facts in one store.

`python -m trainer.meeting [--host H] [--port P]` keeps the store and never trains, so that no replica is one that all need.
A round closes when everyone has come who took part in the last and is alive; whoever came besides joins. It counts when
all who took part say that it went well; one who dies in it makes it fail, and the others meet again. Each fact is
written once, by compare-and-set: whatever dies when, all who live read the same.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

from torch.distributed import DistError, PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.errors import Failed, Parser, Refused, StopSignal, run_program
from trainer.log import Log

_PORT, _CONNECT_S, _PULSES = 29400, 60.0, 5
T = TypeVar("T")


@dataclass(frozen=True)
class Guest:
    replica: int
    life: str
    """Of this start of the replica."""
    step: int
    new: bool = False
    """It took no part in the last round that counted."""
    fragment: int = 0
    """What it comes to average."""
    final: bool = False
    """It comes at the end: there is no training left to join."""


@dataclass(frozen=True)
class Round:
    number: int
    guests: tuple[Guest, ...]

    @property
    def source(self) -> Guest:
        """Whose state the others take who have none: one of those that trained, else who has come furthest."""
        return max(self.guests, key=lambda guest: (not guest.new, guest.step, -guest.replica))

    @property
    def told(self) -> list[Guest]:
        """Those who take it. Where all are new, equals among them have theirs from the same checkpoint."""
        source = self.source
        return [guest for guest in self.guests if guest.new and (not source.new or guest.step < source.step)]

    @property
    def averaged(self) -> int:
        """Those whose training counts."""
        return sum(not guest.new for guest in self.guests)


class MeetingPlace:
    """One replica's way to the store; of its ranks the first alone asks. What has no answer yet is None: ask again.

    Raises Failed when the store has gone.
    """

    def __init__(
        self, endpoint: str, *, purpose: str, replica: int, replicas: int, lost_after_s: float, patience_s: float
    ) -> None:
        """`purpose` keeps apart those who train something else. Who never came is waited for `patience_s`."""
        self.endpoint, self._purpose, self._replica, self.life = endpoint, purpose, replica, uuid4().hex
        self._lost_after_s, self._patience_s, self._begun_s = lost_after_s, patience_s, time.monotonic()
        self._founders = [(number, "") for number in range(replicas)]
        self._store = connect(endpoint, purpose)
        self._pulses: dict[int, tuple[str, float]] = {}
        self._entered: tuple[int, Guest] | None = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def open(self) -> None:
        """From now on this replica is alive to the others."""
        self._asking(lambda: self._store.set(f"pulse/{self._replica}", f"{self.life}:0"))
        self._thread.start()

    def leave(self) -> None:
        """The others need not wait until it counts as lost."""
        self._left.set()
        if self._thread.is_alive():
            self._thread.join(_CONNECT_S)

    def _beat(self) -> None:
        count = 0
        try:
            store = connect(self.endpoint, self._purpose)
            while not self._left.wait(self._lost_after_s / _PULSES):
                count += 1
                store.set(f"pulse/{self._replica}", f"{self.life}:{count}")
            store.set(f"pulse/{self._replica}", "left")
        except (DistError, Failed):
            return  # the training will find out

    # A round

    def come(self, *, step: int, fragment: int = 0, final: bool = False) -> Round | None:
        """The round that this replica is in, once it has closed."""
        me = Guest(self._replica, self.life, step, fragment=fragment, final=final)
        return self._asking(lambda: self._come(me))

    def settle(self, met: Round, *, well: bool) -> bool | None:
        """Whether a round counts, once that is known; `well` is what this replica says of it."""
        return self._asking(lambda: self._settle(met, "well" if well else "failed"))

    def _come(self, me: Guest) -> Round | None:
        if self._entered is None or replace(self._entered[1], new=False) != me:
            number, expected = self._now()
            self._entered = number, replace(me, new=(me.replica, me.life) not in expected)
        # The others may be a round further by now, where one of them failed before this one saw that it had closed.
        number, me = self._entered
        self._store.set(f"{number}/guest/{me.replica}", json.dumps(asdict(me)))
        closed = self._read(f"{number}/round")
        if closed is None:
            _, expected = self._now()
            arrived = self._arrived(number)
            if all(other in arrived or not self._lives(other, life) for other, life in expected):
                final = any(guest.final for guest in arrived.values() if not guest.new)
                guests = [asdict(guest) for guest in arrived.values() if not (final and guest.new)]
                self._write_once(f"{number}/round", json.dumps(guests))
            return None
        self._entered = None
        met = Round(number, tuple(Guest(**guest) for guest in json.loads(closed)))
        if me in met.guests:
            return met
        self._settle(met, None)  # it closed too early for this one
        return None

    def _settle(self, met: Round, report: str | None) -> bool | None:
        if report:
            self._store.set(f"{met.number}/report/{self.life}", report)
        reports = {guest: self._read(f"{met.number}/report/{guest.life}") for guest in met.guests}
        if all(found == "well" for found in reports.values()):
            self._write_once(f"{met.number}/verdict", "well")
        elif any(
            found == "failed" or (found is None and not self._lives(guest.replica, guest.life))
            for guest, found in reports.items()
        ):
            self._write_once(f"{met.number}/verdict", "failed")
        verdict = self._read(f"{met.number}/verdict")
        if verdict is None:
            return None
        now = self._read("now")
        assert now is not None
        number, expected = json.loads(now)
        if number == met.number:
            members = [(guest.replica, guest.life) for guest in met.guests]
            next_one = [number + 1, members if verdict == "well" else expected]
            self._store.compare_set("now", now, json.dumps(next_one))
        return verdict == "well"

    def _now(self) -> tuple[int, list[tuple[int, str]]]:
        """The number of the round that is open, and who is expected there: replicas with their lives."""
        self._write_once("now", json.dumps([0, self._founders]))
        found = self._read("now")
        assert found is not None
        number, expected = json.loads(found)
        return number, [(replica, life) for replica, life in expected]

    def _arrived(self, number: int) -> dict[int, Guest]:
        found = (self._read(f"{number}/guest/{replica}") for replica, _ in self._founders)
        guests = (Guest(**json.loads(text)) for text in found if text is not None)
        return {guest.replica: guest for guest in guests if self._lives(guest.replica, guest.life)}

    def _lives(self, replica: int, life: str) -> bool:
        """Whether its pulse has changed of late, by our own clock. No life means one that has never come."""
        if replica == self._replica:
            return life == self.life
        if not life:
            return time.monotonic() - self._begun_s < self._patience_s
        pulse, now_s = self._read(f"pulse/{replica}") or "", time.monotonic()
        if self._pulses.get(replica, ("", 0.0))[0] != pulse:
            self._pulses[replica] = (pulse, now_s)
        return pulse.startswith(life) and now_s - self._pulses[replica][1] < self._lost_after_s

    # The store

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _write_once(self, key: str, value: str) -> None:
        """The first to write it is right."""
        self._store.compare_set(key, "", value)

    def _asking(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except DistError:
            fix = "Start it again (python -m trainer.meeting); the replicas go on from their checkpoints."
            raise Failed("the meeting place has gone", where=f"MEETING_ENDPOINT={self.endpoint}", fix=fix) from None


def connect(endpoint: str, purpose: str) -> PrefixStore:
    """Raises Refused for an endpoint that is none, Failed where nobody answers."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise Refused("this is no host:port", where=f"MEETING_ENDPOINT={endpoint}", fix="Name the meeting place.")
    try:
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_CONNECT_S))
    except DistError:
        fix = "Start it there: python -m trainer.meeting."
        raise Failed("there is no meeting place", where=f"MEETING_ENDPOINT={endpoint}", fix=fix) from None
    return PrefixStore(purpose, store)


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m trainer.meeting")
    parser.add_argument("--host", default="0.0.0.0")  # noqa: S104 - replicas are on other machines
    parser.add_argument("--port", type=int, default=os.environ.get("MEETING_PORT", str(_PORT)))
    options = parser.parse_args(arguments)
    try:
        listening = socket.create_server((options.host, options.port))
    except (OSError, OverflowError) as error:
        reason, where = getattr(error, "strerror", None) or str(error), f"{options.host}:{options.port}"
        raise Refused(
            f"cannot listen: {reason}", where=where, fix="Set --port or MEETING_PORT to a free one."
        ) from None
    stop = StopSignal()
    stop.listen()
    host, port = listening.getsockname()[:2]
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    Log().emit("meeting", endpoint=f"{host}:{port}")
    while stop.received is None:
        signal.pause()
    del store


if __name__ == "__main__":
    run_program(main)
