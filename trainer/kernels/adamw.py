"""AdamW's step over plain float32 parameters of a CPU, and the norm of their gradients, each as one call of C++.

Of a small model torch's own take longer to go from tensor to tensor, and to wake threads for each, than to compute.
"""

import ctypes
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trainer.kernels.build import Unavailable, library


@cache
def _there() -> bool:
    try:
        library().sum_of_squares.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 2
        library().sum_of_squares.restype = ctypes.c_double
        library().adamw_step.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 6 + [ctypes.c_double] * 6
    except Unavailable:
        return False
    return True


def usable(tensors: Iterable[Tensor]) -> bool:
    """Whether all are whole, plain matrices or vectors in float32 on a CPU."""
    return _there() and all(
        type(each) in (Tensor, nn.Parameter) and each.is_cpu and each.dtype == torch.float32 and each.is_contiguous()
        for each in tensors
    )


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of all numbers of all of them: a scalar."""
    return torch.tensor(math.sqrt(library().sum_of_squares(len(tensors), _numbers(tensors), _addresses(tensors))))


def step(
    group: dict[str, Any], parameters: Sequence[Tensor], states: Sequence[dict[str, Tensor]], factor: float
) -> None:
    """What torch.optim.AdamW does with a group of its own, `parameters` and their `states`, with gradients times `factor`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    moments = [[state[kind] for state in states] for kind in ("exp_avg", "exp_avg_sq", "step")]
    addresses = map(_addresses, (parameters, gradients, *moments))
    numbers = (factor, group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    library().adamw_step(len(parameters), _numbers(parameters), *addresses, *numbers)


def _numbers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_long]:
    return (ctypes.c_long * len(tensors))(*[each.numel() for each in tensors])


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[each.data_ptr() for each in tensors])
