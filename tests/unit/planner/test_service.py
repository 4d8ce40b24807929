"""Traffic on a replica, replicas for an SLO, interruptions: the simulation keeps its accounts, and moves the right way."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.catalog import gpus, instance, models
from infra.planner.inference import replicas_for
from infra.planner.serve_memory import FORMATS
from infra.planner.serve_time import Server
from infra.planner.shape import Shape
from infra.planner.simulate import Load, Room, percentile, requests_of, simulate
from infra.planner.spot import interrupted
from infra.spec import Slo, Traffic

SHAPE = Shape.from_config(models()["llama3-8b"])
SERVER = Server(shape=SHAPE, gpu=gpus()["L40S"], form=FORMATS["bf16"])
ROOM = Room(cache_tokens=200_000, sequences=128)
LOAD = Load(rps=4, prompt_tokens=512, output_tokens=128)


def test_the_same_traffic_gives_the_same_latency() -> None:
    assert simulate(SERVER, load=LOAD, room=ROOM) == simulate(SERVER, load=LOAD, room=ROOM)


def test_an_idle_replica_answers_in_the_time_of_a_prefill() -> None:
    load = replace(LOAD, rps=0.01, spread=0)
    alone = SERVER.prefill_s(tokens=512)
    latency = simulate(SERVER, load=load, room=ROOM, requests=50)
    assert latency.ttft_p50_s == pytest.approx(alone, rel=0.05)
    assert latency.tpot_p50_s == pytest.approx(SERVER.decode_s(batch=1, context=576), rel=0.05)


@settings(max_examples=15, deadline=None)
@given(rps=st.floats(0.1, 20), times=st.floats(1.5, 20))
def test_more_traffic_is_never_faster(rps: float, times: float) -> None:
    light, heavy = (simulate(SERVER, load=replace(LOAD, rps=r), room=ROOM, requests=150) for r in (rps, rps * times))
    assert heavy.ttft_p95_s >= 0.9 * light.ttft_p95_s
    assert heavy.tokens_per_s >= 0.9 * light.tokens_per_s


def test_every_request_is_answered_and_an_overload_is_seen() -> None:
    over = simulate(SERVER, load=replace(LOAD, rps=500), room=Room(cache_tokens=5_000, sequences=4), requests=100)
    assert over.requests == 100
    assert not over.keeps_up
    assert simulate(SERVER, load=LOAD, room=ROOM).keeps_up


def test_output_tokens_a_second_are_those_asked_for() -> None:
    latency = simulate(SERVER, load=replace(LOAD, spread=0), room=ROOM, requests=1000)
    assert latency.tokens_per_s == pytest.approx(4 * 128, rel=0.1)


@given(cache=st.floats(2, 5_000), spread=st.floats(0, 2))
@settings(max_examples=50)
def test_no_request_is_longer_than_the_cache(cache: float, spread: float) -> None:
    made = requests_of(replace(LOAD, spread=spread), number=50, most_tokens=cache)
    assert all(request.prompt + request.output <= cache for request in made)


def test_lengths_have_the_mean_and_the_spread() -> None:
    made = requests_of(replace(LOAD, spread=0.5), number=20_000, most_tokens=math.inf)
    lengths = [request.prompt for request in made]
    mean = sum(lengths) / len(lengths)
    assert mean == pytest.approx(512, rel=0.02)
    assert math.sqrt(sum((n - mean) ** 2 for n in lengths) / len(lengths)) / mean == pytest.approx(0.5, rel=0.05)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_covers_its_share(values: list[float], share: float) -> None:
    found = percentile(sorted(values), share)
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


@settings(max_examples=10, deadline=None)
@given(rps=st.floats(1, 300))
def test_replicas_meet_the_slo_and_one_fewer_does_not(rps: float) -> None:
    slo, traffic = Slo(ttft_p95_s=0.3), Traffic(rps=rps)
    number = replicas_for(SERVER, room=ROOM, traffic=traffic, slo=slo)
    assert number

    def p95(replicas: int) -> tuple[float, bool]:
        load = Load(rps=rps / replicas, prompt_tokens=512, output_tokens=128)
        latency = simulate(SERVER, load=load, room=ROOM, requests=200)
        return latency.ttft_p95_s, latency.keeps_up

    assert p95(number)[0] <= 0.3
    assert number == 1 or p95(number - 1)[0] > 0.3 or not p95(number - 1)[1]


def test_an_slo_below_one_prefill_is_refused() -> None:
    assert replicas_for(SERVER, room=ROOM, traffic=Traffic(rps=1), slo=Slo(ttft_p95_s=0.001)) is None


def test_tensor_parallel_decodes_faster_on_nvlink_and_not_by_more_than_its_gpus() -> None:
    one = replace(SERVER, gpu=gpus()["H100"])
    times = [replace(one, tp=tp, shape=Shape.from_config(models()["llama3-70b"])).decode_s() for tp in (2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert times[0] < 4 * times[2]


def simulated_hours(*, hours: float, interval_s: float, save: float, rate_per_h: float, restart_s: float) -> float:
    """A run under exponential interruptions, played out."""
    draw, clock, done = random.Random(1), 0.0, 0.0
    next_stop = draw.expovariate(rate_per_h / 3600)
    while done < hours * 3600 - 1e-6:
        piece = min(interval_s, hours * 3600 - done)
        if clock + piece + save <= next_stop:
            clock, done = clock + piece + save, done + piece
        else:
            clock = next_stop + restart_s
            next_stop = clock + draw.expovariate(rate_per_h / 3600)
    return clock / 3600


def test_interruptions_cost_what_a_played_run_pays() -> None:
    from infra.planner.spot import RESTART_S

    case = {"hours": 4000.0, "interval_s": 1800.0, "save": 60.0, "rate_per_h": 0.2}
    played = simulated_hours(**case, restart_s=RESTART_S)
    assert interrupted(**case).hours == pytest.approx(played, rel=0.03)


@given(save=st.floats(1, 600), rate=st.floats(1e-4, 0.5), off=st.floats(2, 20))
def test_youngs_interval_is_near_the_best(save: float, rate: float, off: float) -> None:
    best = interrupted(hours=1e5, interval_s=600, save=save, rate_per_h=rate).best_interval_s
    at_best = interrupted(hours=1e5, interval_s=best, save=save, rate_per_h=rate).hours
    for interval_s in (best * off, best / off):
        assert at_best <= 1.03 * interrupted(hours=1e5, interval_s=interval_s, save=save, rate_per_h=rate).hours


def test_without_interruptions_only_saves_cost() -> None:
    run = interrupted(hours=10, interval_s=3600, save=36, rate_per_h=0)
    assert (run.hours, run.interruptions) == (pytest.approx(10.1), 0)


def test_spot_is_marked_as_an_assumption() -> None:
    assert "assumption" in instance("p5.48xlarge").spot_source
