"""How long the planner takes in this process, after imports, against the time that it may take (no peer does this)."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from infra.catalog import gpus, models
from infra.planner import plan, to_json
from infra.planner.search import cheapest_serving, cheapest_training, of_cloud
from infra.planner.serve_memory import FORMATS, cache
from infra.planner.serve_time import Server
from infra.planner.shape import Shape
from infra.planner.simulate import Load, Room, simulate
from infra.spec import Slo, Stack, Traffic, load

ROOT = Path(__file__).parents[2]
RUNS = 5
LLAMA = Shape.from_config(models()["llama3-8b"])


def seconds(work: Callable[[], object], *, runs: int = RUNS) -> float:
    """Median over `runs`; what the planner remembers of a simulation is forgotten before each."""
    found = list[float]()
    for _ in range(runs):
        simulate.cache_clear()
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return median(found)


def large(prod: Stack, *, number: int) -> Stack:
    """`number` pools and as many services, each with traffic of its own."""
    values: dict[str, Any] = prod.model_dump(mode="json")
    pool, service = values["node_pools"][1], values["services"][0]
    values["node_pools"] = [values["node_pools"][0], *(pool | {"name": f"pool-{n}"} for n in range(number - 1))]
    values["services"] = [
        service | {"name": f"chat-{n}", "pool": f"pool-{n % (number - 1)}", "traffic": {"rps": 10 + n / 10}}
        for n in range(number)
    ]
    return Stack.model_validate(values)


def real_time() -> float:
    """Seconds of traffic simulated in a second, for an 8B model on an L40S at 8 requests a second."""
    gpu = gpus()["L40S"]
    server = Server(shape=LLAMA, gpu=gpu, form=FORMATS["bf16"])
    room = Room(cache_tokens=cache(LLAMA, form=FORMATS["bf16"], device_gib=gpu.memory_gib).tokens, sequences=256)
    traffic = Load(rps=8, prompt_tokens=512, output_tokens=128)
    simulated = simulate(server, load=traffic, room=room, requests=4000).simulated_s
    return simulated / seconds(lambda: simulate(server, load=traffic, room=room, requests=4000))


def main() -> None:
    prod = load(ROOT / "stacks" / "Pulumi.prod.yaml")
    many = large(prod, number=500)
    everything = of_cloud(None)

    def train() -> object:
        return cheapest_training(LLAMA, tokens=1e11, deadline_h=240, seq=4096, global_batch=512, among=everything)

    def serve() -> object:
        slo = Slo(ttft_p95_s=0.5, tpot_p95_s=0.05)
        return cheapest_serving(LLAMA, traffic=Traffic(rps=100), slo=slo, among=everything, form=FORMATS["bf16"])

    found = (
        ("plan of prod", seconds(lambda: to_json(plan(prod))), "≤ 1", "s"),
        ("plan of 500 pools and 500 services under traffic", seconds(lambda: to_json(plan(many)), runs=3), "≤ 5", "s"),
        ("search of the catalogue, to train", seconds(train), "≤ 3", "s"),
        ("search of the catalogue, to serve", seconds(serve), "≤ 3", "s"),
        ("simulation against real time", real_time(), "≥ 100", "×"),
    )
    rows = [
        {"name": name, "ours": ours, "peer": None, "ratio": None, "goal": goal, "unit": unit}
        for name, ours, goal, unit in found
    ]
    out = Path("build/bench/planner.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
