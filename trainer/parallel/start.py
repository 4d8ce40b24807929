"""A store of names for each start of the ranks.

torchrun keeps its store when it starts the ranks again, and a quick rank would connect to the address that a dead one
left there. Its count of restarts does not tell starts apart: nodes count for themselves. So rank 0 names the start, and
every other rank asks until it is answered by the rank 0 of now.
"""

import time
from uuid import uuid4

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

_ASK_AGAIN_S = 0.5


def store_of_this_start(store: Store, *, rank: int, world: int) -> PrefixStore:
    """Returns when rank 0 has heard of all ranks; the watchdog ends a wait that is too long."""
    own = uuid4().hex
    if rank == 0:
        store.set("start", own)
        for other in range(1, world):
            asker = store.get(f"{own}/{other}").decode()
            store.set(f"{own}/{other}/{asker}", "")
        return PrefixStore(own, store)
    while True:
        start = store.get("start").decode()  # of an earlier start, it may be
        store.set(f"{start}/{rank}", own)
        ask_again_s = time.monotonic() + _ASK_AGAIN_S
        while time.monotonic() < ask_again_s:
            if store.check([f"{start}/{rank}/{own}"]):
                return PrefixStore(start, store)
            time.sleep(0.01)
