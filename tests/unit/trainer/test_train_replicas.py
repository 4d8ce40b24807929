"""Replicas that train apart may die and return: the others go on, and in the end all have the same weights."""

import json
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from programs_of_trainer import TRAIN, program_environment
from replicas_of_trainer import Replica
from safetensors.torch import load_file
from torch.distributed import TCPStore

from trainer.config import TrainConfig
from trainer.errors import Failed, Refused, StopSignal
from trainer.meeting import MeetingPlace, Round
from trainer.train import train

LOST_AFTER_S = 10.0  # a busy machine may keep a living one from its turn for seconds
LOCAL = {"every_steps": 5, "fragments": 2, "outer_momentum": 0.5, "launches": 3, "lost_after_s": LOST_AFTER_S}
CONFIG = {
    **TRAIN,
    "global_batch": 12,
    "micro_batch": 2,
    "steps": 60,
    "parallelism": {"dp_shard": 2},
    "checkpoint": {"every_steps": 10},
    "recover": {"hang_timeout_s": 60.0},
}


@pytest.fixture(scope="module")
def meeting():
    """The address of the program that keeps the store."""
    command = [sys.executable, "-m", "trainer.meeting", "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=program_environment())
    assert process.stdout is not None
    yield json.loads(process.stdout.readline())["endpoint"]
    process.terminate()
    assert process.wait(30) == 0


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def joined(replica: Replica) -> list[int]:
    """The steps at which it took over another's state."""
    events = [json.loads(line) for line in replica.said.read_text().splitlines() if line.startswith("{")]
    return [event["step"] for event in events if event["event"] == "joined"]


def steps(replica: Replica) -> list[int]:
    return [row["step"] for row in rows(replica.run)]


@pytest.mark.slow
def test_replicas_die_and_stall_and_return_and_the_others_never_stop(dataset, meeting, tmp_path):
    config = TrainConfig.model_validate({**CONFIG, "local_sgd": LOCAL})
    constant, killed, stalled = replicas = [
        Replica(number, config, data=dataset, directory=tmp_path, meeting=meeting, pause_s=0.1) for number in range(3)
    ]
    for replica in replicas:
        replica.start()
    killed.wait_for(12)
    killed.kill()
    gone_at = steps(killed)[-1]
    constant.wait_for(gone_at + 6)  # at least one average without it
    killed.start()
    killed.wait_for(len(steps(killed)) + 1)
    # Between two averages, which are after steps 5n and 5n + 2: who is stopped in one has still to find out that it failed
    # when the others have trained to their end.
    stalled.wait_for(next(step for step in count(steps(stalled)[-1] + 1) if step % 5 == 3))
    stalled.signal(signal.SIGSTOP)
    constant.wait_for(steps(stalled)[-1] + 6)
    stalled.signal(signal.SIGCONT)
    for replica in replicas:
        assert replica.wait() == [0, 0], replica.said.read_text()

    assert joined(constant) == []
    assert steps(constant) == list(range(1, CONFIG["steps"] + 1))
    for replica in (killed, stalled):
        (step,) = joined(replica)
        assert not {step - 1, step, step + 1} - set(steps(constant))
        assert steps(replica)[-1] == CONFIG["steps"]
    one, *more = (load_file(replica.run / "model" / "model.safetensors") for replica in replicas)
    assert all(torch.equal(one[name], other[name]) for other in more for name in one)

    undisturbed = TrainConfig.model_validate({**CONFIG, "parallelism": {}})
    train(undisturbed, data=dataset, run=tmp_path / "one", stop=StopSignal())
    together, apart = ([row["loss"] for row in rows(run)[-10:]] for run in (tmp_path / "one", constant.run))
    assert sum(apart) == pytest.approx(sum(together), rel=0.05)


# The protocol alone


def place_of(endpoint: str, replica: int, *, purpose: str, replicas: int = 3) -> MeetingPlace:
    place = MeetingPlace(
        endpoint, purpose=purpose, replica=replica, replicas=replicas, lost_after_s=30.0, patience_s=60.0
    )
    place.open()
    return place


def meet(place: MeetingPlace, step: int, *, well: bool = True, answers: bool = True) -> tuple[Round, bool | None]:
    while (met := place.come(step=step)) is None:
        time.sleep(0.01)
    if not answers:
        return met, None
    while (verdict := place.settle(met, well=well)) is None:
        time.sleep(0.01)
    return met, verdict


def all_meet(*visits) -> list[tuple[Round, bool | None]]:
    """Each visit is (place, step, more), made at the same time."""
    found: list = [None] * len(visits)

    def visit(at: int, place: MeetingPlace, step: int, more: dict) -> None:
        found[at] = meet(place, step, **more)

    threads = [threading.Thread(target=visit, args=(at, *one)) for at, one in enumerate(visits)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_all_meet_in_the_same_round_and_the_founders_begin_from_the_furthest(meeting):
    places = [place_of(meeting, number, purpose="founding") for number in range(3)]
    found = all_meet(*((place, step, {}) for place, step in zip(places, (4, 8, 0), strict=True)))
    (met, well), *others = found
    assert others == [(met, well)] * 2
    assert (well, met.averaged, met.source.replica) == (True, 0, 1)
    assert [guest.replica for guest in met.told] == [0, 2]
    (met, well), *_ = all_meet(*((place, 13, {}) for place in places))
    assert (well, met.number, met.averaged, met.told) == (True, 1, 3, [])


def test_one_that_dies_before_a_round_is_left_out_and_one_that_returns_is_told(meeting):
    places = [place_of(meeting, number, purpose="return") for number in range(3)]
    all_meet(*((place, 0, {}) for place in places))
    places[2].leave()
    met, well = all_meet(*((place, 5, {}) for place in places[:2]))[0]
    assert (well, [guest.replica for guest in met.guests]) == (True, [0, 1])
    again = place_of(meeting, 2, purpose="return")
    for _ in range(5):  # it does not close a round in which those who train are still to come
        assert again.come(step=3) is None
    found: list = []
    waiting = threading.Thread(target=lambda: found.append(meet(again, 3)))
    waiting.start()
    met, well = all_meet(*((place, 10, {}) for place in places[:2]))[0]
    waiting.join(60)
    assert found == [(met, well)]
    assert (well, met.averaged, [guest.replica for guest in met.told], met.source.step) == (True, 2, [2], 10)


def test_a_round_in_which_one_dies_counts_for_nobody_and_is_held_again_without_it(meeting):
    places = [place_of(meeting, number, purpose="dies") for number in range(3)]
    all_meet(*((place, 0, {}) for place in places))
    dying = threading.Thread(target=lambda: (meet(places[2], 5, answers=False), places[2].leave()))
    dying.start()
    found = all_meet((places[0], 5, {}), (places[1], 5, {}))
    dying.join(60)
    assert [well for _, well in found] == [False, False]
    found = all_meet((places[0], 5, {}), (places[1], 5, {}))
    assert [(well, [guest.replica for guest in met.guests]) for met, well in found] == [(True, [0, 1])] * 2


def test_one_says_that_it_failed_and_all_know(meeting):
    places = [place_of(meeting, number, purpose="failed") for number in range(3)]
    all_meet(*((place, 0, {}) for place in places))
    found = all_meet(*((place, 5, {"well": place is not places[1]}) for place in places))
    assert [well for _, well in found] == [False] * 3


def test_a_meeting_place_that_is_not_there_or_goes_is_told(monkeypatch):
    monkeypatch.setattr("trainer.meeting._CONNECT_S", 1.0)
    with pytest.raises(Refused, match="no host:port"):
        MeetingPlace("nowhere", purpose="x", replica=0, replicas=2, lost_after_s=1.0, patience_s=1.0)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = MeetingPlace(
        f"127.0.0.1:{store.port}", purpose="x", replica=0, replicas=2, lost_after_s=1.0, patience_s=1.0
    )
    assert place.come(step=0) is None
    port = store.port
    del store
    with pytest.raises(Failed, match="meeting place has gone"):
        place.come(step=0)
    with pytest.raises(Failed, match="there is no meeting place"):
        MeetingPlace(f"127.0.0.1:{port}", purpose="x", replica=0, replicas=2, lost_after_s=1.0, patience_s=1.0)


def test_a_launch_says_which_replica_it_is(dataset, tmp_path, monkeypatch):
    config = TrainConfig.model_validate({**CONFIG, "parallelism": {}, "local_sgd": LOCAL})
    for said, where in [({}, "REPLICA"), ({"REPLICA": "3"}, "REPLICA"), ({"REPLICA": "2"}, "MEETING_ENDPOINT")]:
        for name in ("REPLICA", "MEETING_ENDPOINT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in said.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Refused, match=rf"\({where}\)"):
            train(config, data=dataset, run=tmp_path, stop=StopSignal())
