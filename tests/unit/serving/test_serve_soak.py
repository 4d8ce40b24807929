"""The first minutes of a soak (tests/bench/bench_serve_soak.py goes on for as long as asked): nothing grows."""

import asyncio
from pathlib import Path

from tiny_adapters import write_adapter

from tests.bench.bench_serve_soak import Soak, memory_bytes

GROWTH = 1.02  # of some 350 MiB: 150 requests that kept 50 kB each would show


def test_mixed_traffic_leaves_no_memory_behind(tiny: Path, tmp_path: Path, start_server) -> None:
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, seed=seed)
    server = start_server(tiny, "--adapters-dir", str(tmp_path), "--max-adapters", "1", "--max-num-seqs", "8")
    soak = Soak(server.wait_ready().url)
    asyncio.run(soak.run(seconds=60, requests=100))
    before = memory_bytes(server.process.pid)
    asyncio.run(soak.run(seconds=60, requests=150))
    assert memory_bytes(server.process.pid) < GROWTH * before
    assert soak.failures == 0
    server.wait_until(lambda: server.metric("slipway_serve_requests_in_flight") == 0, "the last request's end")
    assert server.metric("slipway_serve_kv_used_ratio") == 0
    assert server.metric("slipway_serve_memory_bandwidth_ratio") > 0
    assert server.metric("slipway_serve_mfu_ratio") > 0
    assert server.events("error") == []
