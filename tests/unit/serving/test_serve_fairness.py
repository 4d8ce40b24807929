"""Who is let in first, and who is thrown out: by priority, and within one by what a tenant has had."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.engine import Engine
from serving.engine.fair_queue import FairQueue
from serving.engine.messages import SamplingParams
from serving.engine.sequence import Sequence
from serving.settings import Settings

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # tokens · (k, v) · layers · heads · size · float32


def load(root: Path, **changes: int) -> Engine:
    return Engine.load(root, Settings(**{"model": str(root), **changes}))


def order_of_ends(engine: Engine, asked: list[tuple[str, int]]) -> list[int]:
    """Asks for each (tenant, priority) at once, and says in which order they were answered."""
    for seq_id, (tenant, priority) in enumerate(asked):
        engine.add(seq_id, [seq_id + 1] * 20, GREEDY, arrived_s=0.0, tenant=tenant, priority=priority)
    ends = []
    while engine.has_work:
        ends += [output.seq_id for output in engine.step() if output.finish_reason]
    return ends


def test_a_tenant_with_many_requests_holds_up_none_with_few(tiny: Path) -> None:
    ends = order_of_ends(load(tiny, max_num_seqs=1), [("many", 0)] * 6 + [("few", 0)] * 2)
    assert ends == [0, 6, 1, 7, 2, 3, 4, 5]


def test_a_higher_priority_goes_before_whoever_has_had_less(tiny: Path) -> None:
    ends = order_of_ends(load(tiny, max_num_seqs=1), [("a", -1), ("b", 0), ("a", 0), ("c", 1), ("a", 1)])
    assert ends == [3, 4, 1, 2, 0]


def test_want_of_memory_throws_out_the_lowest_priority(tiny: Path) -> None:
    """Those of the higher class came last, and are never computed again for the sake of the others."""
    e, outputs = load(tiny, kv_bytes=17 * BLOCK_BYTES), []
    long = GREEDY._replace(max_tokens=90)  # two of them fit
    for seq_id, priority in enumerate((-1, -1, 0, 0)):
        e.add(seq_id, [seq_id + 1] * 30, long, arrived_s=0.0, priority=priority)
        outputs += e.step()
    longest = [0] * 4
    while e.has_work:
        outputs += e.step()
        for seq_id, seq in e.sequences.items():
            assert seq.priority < 0 or seq.num_computed >= longest[seq_id]
            longest[seq_id] = seq.num_computed
    assert e.counters.preemptions > 0
    texts = ["".join(output.text for output in outputs if output.seq_id == seq_id) for seq_id in range(4)]
    assert texts == load(tiny).generate([[seq_id + 1] * 30 for seq_id in range(4)], long)
    assert e.scheduler.blocks.used_ratio == 0.0


class Customer(Sequence):
    """A sequence of so many tokens, which is all that the queue knows of it."""

    def __init__(self, seq_id: int, tenant: str, tokens: int) -> None:
        super().__init__(seq_id, [1] * tokens, GREEDY, decode=lambda _: "", arrived_s=0.0, tenant=tenant)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=40))
def test_while_tenants_wait_they_differ_by_one_request_at_most(arrivals: list[tuple[str, int]]) -> None:
    queue, had = FairQueue(), dict.fromkeys("abc", 0)
    for seq_id, (tenant, tokens) in enumerate(arrivals):
        queue.add(Customer(seq_id, tenant, tokens))
    served: list[Sequence] = []
    while len(queue):
        waiting = {seq.tenant for seq in queue}
        seq = queue.first()
        queue.remove(seq)
        queue.charge(seq, len(seq))
        had[seq.tenant] += len(seq)
        served.append(seq)
        still = {seq.tenant for seq in queue} & waiting
        assert max((had[tenant] for tenant in still), default=0) - min((had[t] for t in still), default=0) <= 50
    for tenant in "abc":  # and each one's own are answered in the order in which they came
        own = [seq.seq_id for seq in served if seq.tenant == tenant]
        assert own == sorted(own)


def test_who_comes_back_has_saved_nothing_up() -> None:
    queue = FairQueue()
    first, *others = (Customer(seq_id, "busy", 10) for seq_id in range(4))
    for seq in (first, *others):
        queue.add(seq)
    queue.remove(first)
    queue.charge(first, 1000)
    late = [Customer(seq_id, "late", 10) for seq_id in (10, 11)]
    for seq in late:
        queue.add(seq)
    order = []
    while len(queue):
        seq = queue.first()
        queue.remove(seq)
        queue.charge(seq, 10)
        order.append(seq.tenant)
    assert order == ["busy", "late"] * 2 + ["busy"]
