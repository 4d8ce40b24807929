"""How processes that share memory wait for one another, as one call of C++ that others need not wait for."""

import ctypes
from functools import cache

from torch import Tensor

from trainer.kernels.build import Unavailable, library


@cache
def usable() -> bool:
    try:
        library().meet.argtypes = [ctypes.c_void_p] + [ctypes.c_long] * 4
    except Unavailable:
        return False
    return True


def meet(turns: Tensor, *, ranks: int, rank: int, turn: int, wait_us: int) -> bool:
    """Tells the others through `turns`, a line of 64 bytes for each, that `rank` has come to `turn`.

    Waits, awake, until all have, but at most `wait_us`; returns whether they did.
    """
    return bool(library().meet(turns.data_ptr(), ranks, rank, turn, wait_us))
