"""Time of a collective over a group of GPUs: NCCL's own model, latency of each step of a ring and bandwidth of each protocol.

The latencies and shares are those of NCCL's tuner (NVIDIA/nccl, src/graph/tuning.cc: baseLat, hwLat, LL128's 0.92, the factor
on Simple's latency where a ring is at its plateau), which NCCL itself uses to choose a protocol; we take the fastest as it does.
"""

import math
from dataclasses import dataclass
from typing import Literal

from infra.catalog import Gpu

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "send", "all_to_all"]

BUS_SHARE = 0.80
"""Share of a link's line rate that payload gets: protocol headers (sjeaugey in NVIDIA/nccl-tests#212: 370 of 450 GB/s)."""


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's three: microseconds to begin, for a step over NVLink, PCIe and the network, and its share of bandwidth."""

    base_us: float
    nvlink_us: float
    pcie_us: float
    network_us: float
    share: float
    plateau: float = 1.0


LL128_SHARE = {"hopper": 0.92, "blackwell": 0.92}
"""Share of bandwidth that LL128 (120 of 128 bytes are payload) gets; before Hopper its channels saturate at `LL128_OLDER`."""
LL128_OLDER = 0.55

PROTOCOLS = (
    Protocol(6.6, 0.6, 1.0, 2.7, 0.25),  # LL: a flag with every 4 bytes
    Protocol(14.0, 1.9, 1.9, 4.0, LL128_SHARE["hopper"]),
    Protocol(8.4, 3.4, 5.7, 14.0, 1.0, plateau=1.9),  # Simple
)
TREE_SHARE = 0.85
"""Bandwidth of a tree beside a ring's (tuning.cc)."""
LL128 = PROTOCOLS[1]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that speak with one another: `size` of them, `stride` apart, on nodes of `node` GPUs."""

    size: int
    stride: int = 1
    node: int = 8

    @property
    def per_node(self) -> int:
        """Ranks of the group on one node."""
        return max(min(self.size, self.node // self.stride), 1)

    @property
    def nodes(self) -> int:
        return -(-self.size // self.per_node)


def bus_gbps(gpu: Gpu, group: Group) -> float:
    """Bandwidth that each rank of a ring gets, GB/s: between nodes the NICs of the group's ranks carry it together."""
    inside = gpu.intra_gbps * BUS_SHARE
    return inside if group.nodes == 1 else min(inside, gpu.nic_gbps * BUS_SHARE * group.per_node)


def collective_s(kind: Collective, *, message_bytes: float, gpu: Gpu, group: Group) -> float:
    """Seconds for a collective whose whole (gathered) message has `message_bytes`, by the fastest protocol of a ring.

    A ring takes 2(n−1) steps for an all-reduce, n−1 for the others, and moves 2(n−1)/n or (n−1)/n of the message. An all-to-all
    is n−1 sends, of which each rank's own NIC carries what leaves the node.
    """
    n = group.size
    if n == 1:
        return 0.0
    times = 2 if kind == "all_reduce" else 1
    steps, share = (1, 1.0) if kind == "send" else (times * (n - 1), times * (n - 1) / n)
    between = 0 if group.nodes == 1 else times * group.nodes
    nvlink = gpu.intra_gbps > 64
    bus = bus_gbps(gpu, group) * 1e9
    if kind == "all_to_all" and group.nodes > 1:
        bus = min(gpu.intra_gbps, gpu.nic_gbps * (n - 1) / (n - group.per_node)) * BUS_SHARE * 1e9
    best = float("inf")
    for protocol in PROTOCOLS:
        protocol_share = protocol.share
        if protocol is LL128:
            if not nvlink:
                continue
            protocol_share = LL128_SHARE.get(gpu.architecture, LL128_OLDER)
        step_us = protocol.nvlink_us if nvlink else protocol.pcie_us
        latency_us = protocol.base_us + max(steps - between, 0) * step_us + min(between, steps) * protocol.network_us
        at_plateau = kind == "all_reduce" and group.nodes == 1 and message_bytes > 2**23
        latency_us *= protocol.plateau if at_plateau else 1
        best = min(best, latency_us * 1e-6 + message_bytes * share / (bus * protocol_share))
        if kind == "all_reduce" and group.nodes > 1:
            # A double binary tree between nodes and a chain inside: logarithmic in nodes, up and down.
            hops = 2 * math.log2(group.nodes)
            tree_us = protocol.base_us + hops * protocol.network_us + 2 * (group.per_node - 1) * step_us
            best = min(best, tree_us * 1e-6 + message_bytes * share / (bus * protocol_share * TREE_SHARE))
    return best
