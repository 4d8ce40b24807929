"""Blocks that left the engine's memory come back as they were: answers stay the same, and prompts are not computed again."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_packages import make_package

from serving import cache
from serving.cache import BlockStore, MemoryStore, RedisStore, open_store
from serving.engine.engine import Engine
from serving.engine.messages import SamplingParams
from serving.errors import Refused
from serving.settings import Settings
from tests.redis_server import redis_server

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
KV_BYTES_PER_BLOCK = 16 * 2 * 2 * 2 * 16 * 4  # tokens · (k, v) · layers · heads · size · float32
PROMPTS = [[1 + (i * (n + 3)) % 380 for i in range(100)] for n in range(8)]


def engine(root: Path, *, spill: str | None, blocks: int = 20, dtype: str = "float32") -> Engine:
    kv_bytes = blocks * KV_BYTES_PER_BLOCK
    return Engine.load(root, Settings(model=str(root), kv_bytes=kv_bytes, kv_spill=spill, dtype=dtype))


def one_by_one(e: Engine) -> list[str]:
    return [e.generate([prompt], GREEDY)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_that_left_memory_is_found_again(tiny: Path, dtype: str) -> None:
    """20 blocks hold two of the eight prompts, so that each has left by the time it is asked again."""
    plain, spilling = engine(tiny, spill=None, dtype=dtype), engine(tiny, spill="8388608", dtype=dtype)
    expected = one_by_one(plain)
    assert one_by_one(plain) == expected
    assert plain.counters.prefix_hit_tokens == 0
    assert one_by_one(spilling) == expected
    assert spilling.counters.prefix_hit_tokens == 0
    assert one_by_one(spilling) == expected
    assert spilling.counters.prefix_hit_tokens == 8 * 96
    assert spilling.generate(PROMPTS * 2, GREEDY) == expected * 2
    blocks = spilling.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 40)), max_size=60))
def test_memory_is_bounded_and_returns_what_was_put(operations: list[tuple[bool, int, int]]) -> None:
    store, sizes = MemoryStore(100), {}
    for put, key, size in operations:
        size = sizes.setdefault(key, size)
        if put:
            store.put(bytes([key]), bytes([key]) * size)
            assert store.get_first([bytes([key])]) == [bytes([key]) * size]
        else:
            assert store.get_first([bytes([key])]) in ([], [bytes([key]) * size])
        assert sum(map(len, store._contents.values())) == store._used_bytes <= 100


def test_a_chain_ends_at_its_first_gap() -> None:
    store = MemoryStore(100)
    for key in (b"a", b"b", b"d"):
        store.put(key, key * 3)
    assert store.get_first([b"a", b"b", b"c", b"d"]) == [b"aaa", b"bbb"]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


def stored(e: Engine) -> BlockStore:
    spill = e.scheduler.blocks.spill
    assert spill is not None
    return spill.store


def test_replicas_share_prefixes_and_other_models_do_not(tiny: Path, redis_url: str, tmp_path: Path) -> None:
    first, second = engine(tiny, spill=redis_url), engine(tiny, spill=redis_url)
    other = engine(make_package(tmp_path / "other", seed=1), spill=redis_url)
    expected = one_by_one(first)
    store = stored(first)
    assert isinstance(store, RedisStore)
    store.flush()
    assert one_by_one(second) == expected
    assert second.counters.prefix_hit_tokens == 8 * 96
    one_by_one(other)
    assert other.counters.prefix_hit_tokens == 0


def test_without_its_redis_an_engine_answers_as_ever(tiny: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        away = engine(tiny, spill=f"redis://127.0.0.1:{taken.getsockname()[1]}/0")
        assert one_by_one(away) == one_by_one(engine(tiny, spill=None))


def test_a_redis_that_goes_and_comes_back_is_told_once_and_shared_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "RETRY_S", 0.0)
    expected = one_by_one(engine(tiny, spill=None))

    def told() -> list[str]:
        return [event["event"] for event in map(json.loads, capsys.readouterr().out.splitlines())]

    with redis_server(tmp_path) as url:
        shared = engine(tiny, spill=url)
        store = stored(shared)
        assert isinstance(store, RedisStore)
        assert one_by_one(shared) == expected
        store.flush()
    assert one_by_one(shared) == expected
    store.flush()
    assert shared.counters.prefix_hit_tokens == 0
    assert shared.counters.spill_failures > 1
    assert told().count("store_away") == 1
    with redis_server(tmp_path, port=int(url.split(":")[2].split("/")[0])):
        assert one_by_one(shared) == expected
        store.flush()
        assert one_by_one(shared) == expected
        assert shared.counters.prefix_hit_tokens == 8 * 96
        assert told().count("store_back") == 1


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(Refused, match="redis://HOST"):
        open_store("redis://127.0.0.1:port")
