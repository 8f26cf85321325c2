"""Real processes that speak over gloo, for the tests of many."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

# How long a test waits for its processes, in seconds.
_PATIENCE = 240


def in_processes(n: int, function: Callable[..., Result], *args: Any) -> list[Result]:
    """What ``function(*args)`` returns in each of n processes that are a group of torch.distributed, by rank.

    The function and all that it takes and gives is pickled: tensors go as they are, by value.

    Raises:
        RuntimeError: when one of them raises, with its traceback.
    """
    # A server that has imported everything forks them: it has started no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preloaded"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(rank, n, Path(folder), function, args), daemon=True) for rank in range(n)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(_PATIENCE)
        finally:
            for process in processes:
                process.kill()
        outcomes = [_outcome(Path(folder) / f"{rank}.pt") for rank in range(n)]
    errors = [f"process {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [result for result, _ in outcomes]


def _run(rank: int, n: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    result, error = None, None
    try:
        torch.manual_seed(0)
        result = function(*args)
    except BaseException:
        error = traceback.format_exc()
    torch.save((result, error), folder / f"{rank}.unfinished")
    (folder / f"{rank}.unfinished").rename(folder / f"{rank}.pt")
    os._exit(0 if error is None else 1)  # without waiting for peers that may be gone


def _outcome(path: Path) -> tuple[Any, str | None]:
    if not path.exists():
        return None, "ended without a result"
    outcome: tuple[Any, str | None] = torch.load(path, weights_only=False)
    return outcome
