"""The link between the machine and its node: a pair of interfaces, one at each end, and the route to pods and Services."""

import contextlib
import socket
import struct

from infra.clouds.local.debian import Debian
from infra.clouds.local.node import LINK
from infra.clouds.local.places import INTERFACE, LINK_BITS, MACHINE_IP, NETWORK, NODE_IP, ClusterError
from infra.clouds.local.shell import run

# Of <linux/rtnetlink.h> and <linux/netlink.h>.
RTM_DELLINK, NLM_F_REQUEST, NLM_F_ACK = 17, 1, 4
HEADER, LINK_MESSAGE = "=IHHII", "=BxHiII"


def make(pid: int, debian: Debian) -> None:
    """Link the machine to the network namespace of `pid`. Raises `ClusterError`."""
    for words in (
        f"link add {INTERFACE} type veth peer name {LINK} netns {pid}",
        f"address add {MACHINE_IP}/{LINK_BITS} dev {INTERFACE}",
        f"link set {INTERFACE} up",
        f"route add {NETWORK} via {NODE_IP}",
    ):
        done = run("ip", *words.split(), env=debian.env)
        if done.returncode:
            raise ClusterError(f"ip {words}: {done.stderr.strip()}")


def is_there() -> bool:
    return any(name == INTERFACE for _, name in socket.if_nameindex())


def remove() -> None:
    """Remove the machine's end; the other end and the routes go with it. Nothing where there is none. Raises `ClusterError`.

    Said to the kernel directly: `ip` may be a program of the cache, and a cluster must go without its cache. The kernel would
    remove it as well, some time after the namespace of the other end has lost its last process.
    """
    with contextlib.suppress(OSError):
        message = struct.pack(LINK_MESSAGE, socket.AF_UNSPEC, 0, socket.if_nametoindex(INTERFACE), 0, 0)
        length = struct.calcsize(HEADER) + len(message)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            kernel.send(struct.pack(HEADER, length, RTM_DELLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + message)
            kernel.recv(4096)
    if is_there():
        raise ClusterError(f"the interface {INTERFACE} cannot be removed. Fix: ip link delete {INTERFACE}")
