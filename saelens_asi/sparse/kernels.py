"""Where loops compiled by numba stand in for torch's operations: on a CPU, in float32 and float64, where numba is.

``pip install "saelens_asi[fast]"`` installs it. Without it, and for all other tensors, torch's operations give the same
results up to rounding. A result does not depend on the number of threads.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

enabled = True
"""Set to False to have torch's operations everywhere."""

# Parts that a thread takes at a time: many enough that threads end together where rows cost unequally.
_PARTS_PER_THREAD = 8


@cache
def load_kernels() -> dict[str, Any]:
    """The kernels by name, compiled or read from numba's cache; none of them without a numba that works."""
    if importlib.util.find_spec("numba") is None:
        return {}
    logger.info("loading kernels; numba compiles them once, in about half a minute, and keeps them on disk")
    start = time.perf_counter()
    try:
        module = importlib.import_module("saelens_asi.sparse.numba_kernels")
    except Exception as error:  # numba refuses some versions of numpy, and a home without a place for its cache
        logger.warning("numba cannot be used (%s): training steps take torch's operations", error)
        return {}
    logger.info("loaded kernels in %.1f s", time.perf_counter() - start)
    return dict(vars(module))


def kernels_take(*tensors: Tensor) -> bool:
    """Whether kernels are available for these: on a CPU, contiguous, of one dtype, float32 or float64."""
    first = tensors[0].dtype
    if first not in (torch.float32, torch.float64):
        return False
    fitting = all(t.dtype == first and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    return fitting and enabled and bool(load_kernels())


def run_kernel(name: str, n: int, *arguments: Any) -> None:
    """Call a kernel of ``numba_kernels`` for rows 0 to n, on as many threads as torch uses.

    Args:
        name: of the kernel.
        n: rows of its output.
        arguments: tensors; numbers are given in the dtype of the first tensor.
    """
    kernel = load_kernels()[name]
    dtype = arguments[0].detach().numpy().dtype.type
    converted = [
        a.detach().numpy() if isinstance(a, Tensor) else a if isinstance(a, int) else dtype(a) for a in arguments
    ]
    n_threads = torch.get_num_threads()
    n_parts = min(n, n_threads * _PARTS_PER_THREAD)
    if n_threads == 1 or n_parts <= 1:
        kernel(*converted, 0, n)
        return
    bounds = [n * i // n_parts for i in range(n_parts + 1)]
    parts = iter(list(itertools.pairwise(bounds)))

    def work() -> None:
        for lo, hi in parts:
            kernel(*converted, lo, hi)

    others = [_pool(n_threads - 1, os.getpid()).submit(work) for _ in range(n_threads - 1)]
    work()
    for other in others:
        other.result()


@cache
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process; a fork has none of its parent's."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="saelens_asi")
