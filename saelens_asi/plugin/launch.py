"""The processes that ``torchrun`` has launched: how they meet, who speaks, and what is said when one is lost."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import logging
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from saelens_asi.initialization import package_version
from saelens_asi.sparse.shards import Group, Processes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# What torchrun gives to each process, and torch's ``init_process_group`` reads.
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# What gloo and NCCL raise where another process is gone: their own error, or its base.
_LOST = (dist.DistError, RuntimeError)

# How long a process looks for an answer of the first before it looks whether that is still the first, in seconds; and
# how long in all, as torch waits for processes.
_LOOK, _PATIENCE = 1.0, 1800.0

# How long a process that fails may take to end, in seconds.
_LAST_WORDS = 5.0

_OWN = uuid.uuid4().hex  # tells this process from those that had its rank in an earlier start
_runs = itertools.count()


def is_launched() -> bool:
    """Whether this process is one of several of torchrun's, or of a group that the user has made."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return all(name in os.environ for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


def processes(batch_shards: int, device: str) -> Processes:
    """All processes of this run, which meet here for the first time; alone where there is one.

    Args:
        batch_shards: parts that a batch is split into.
        device: of the SAE.

    Raises:
        ValueError: for ``batch_shards`` that does not divide their number, or one GPU for several of them.
    """
    if not is_launched():
        return Processes()
    kind, index = torch.device(device).type, torch.device(device).index
    if index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(f"device={device!r} is one for all processes: give {kind!r}, and each takes its own")
    return _met(batch_shards, kind)


@cache
def _met(batch_shards: int, device_type: str) -> Processes:
    if not dist.is_initialized():
        # Small decisions are made on the CPU, so that a GPU need not be waited for.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        store, rank, size = _rendezvous()
        # Apart for each start: torchrun's own store keeps the addresses of processes that have ended (torch 2.13).
        store = dist.PrefixStore(f"start {_name_of_start(store, rank, size)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        atexit.register(_leave)
    if "cpu" not in (of_devices := dist.get_backend_config()):
        raise ValueError(
            f"init_process_group was called for {of_devices!r}, which serves no CPU: give it 'cpu:gloo,cuda:nccl', or "
            "leave the call to this package"
        )
    _check_split(batch_shards, device_type)
    met = Processes.spread(batch_shards, device_type)
    # What is drawn from here on, initial weights first, is drawn alike; torch seeds each process by itself.
    torch.set_rng_state(met.world.as_first_(torch.get_rng_state()))
    if not met.world.is_first:
        _be_quiet()
    else:
        logger.info("%d processes: %d share the features", met.world.size, met.features.size)
    return met


def _leave() -> None:
    """Threads of a group that nobody took down can abort a process whose work is done (torch 2.13, gloo)."""
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def _rendezvous() -> tuple[dist.Store, int, int]:
    """The store that torchrun keeps for all starts of its processes, and this one's rank among how many."""
    found: tuple[dist.Store, int, int] = next(iter(dist.rendezvous("env://")))
    return found


def _name_of_start(store: dist.Store, rank: int, size: int, own: str = _OWN) -> str:
    """What the processes that live now, and no earlier ones, agree on; raises TimeoutError where some do not come.

    Counts of restarts do not tell it: after a failure on one machine those of the others start theirs again uncounted.
    """
    if rank == 0:
        store.set("start", own)
        here = [store.get(f"{own} {other}").decode() for other in range(1, size)]
        store.set(f"{own} begins", json.dumps(here))
        return own
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        start = store.get("start").decode()  # may be that of a first process that has ended
        store.set(f"{start} {rank}", own)
        try:
            store.wait([f"{start} begins"], timedelta(seconds=_LOOK))
        except dist.DistError:
            continue
        if own in json.loads(store.get(f"{start} begins")):
            return start
        time.sleep(_LOOK / 10)
    raise TimeoutError(f"process {rank} of {size} waited {_PATIENCE:g} s for the others: was one never started?")


def _check_split(batch_shards: int, device_type: str) -> None:
    """Raise ValueError where processes would make other groups: they would wait for one another."""
    world = Group(dist.get_rank(), dist.get_world_size())
    check_alike(world, {"batch_shards": batch_shards, "the type of device": device_type})


def of_first_start(value: Any) -> Any:
    """What a run of a program was given here when torchrun started it first; None if that is now, or without torchrun.

    To be called once a run, by the first process: a run is told from others of the program by their order.

    Args:
        value: as JSON.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    key = f"run {next(_runs)}"
    owner, first = json.loads(_rendezvous()[0].compare_set(key, "", json.dumps([_OWN, value])))
    return None if owner == _OWN else first


def _be_quiet() -> None:
    """One process speaks, shows the bars and writes to W&B; the others follow it, and warn of nothing."""
    os.environ["WANDB_MODE"] = "disabled"
    for name in ("saelens_asi", "sae_lens"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[assignment, method-assign]


def only_first(world: Group, act: Callable[[], Result]) -> Result:
    """What ``act`` returns or raises in the first process, in all: for what is looked up or written once."""
    result: Any = None
    error: Exception | None = None
    if world.is_first:
        try:
            result = act()
        except Exception as raised:
            error = raised
    result, error = world.of_first((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def check_alike(world: Group, settings: Mapping[str, Any]) -> None:
    """Raise ValueError, in all processes, where one has other settings or versions than the first; names them."""
    of_all = world.gather_objects({name: str(value) for name, value in {**settings, **_versions()}.items()})
    unlike = [
        f"{name} is {of_all[0].get(name)} in process 0 and {other.get(name)} in process {rank}"
        for rank, other in enumerate(of_all)
        for name in sorted(of_all[0].keys() | other.keys())
        if of_all[0].get(name) != other.get(name)
    ]
    if unlike:
        raise ValueError(f"the processes of a run need the same settings and versions: {'; '.join(unlike)}")


def _versions() -> dict[str, str]:
    packages = ("sae-lens", "torch", "transformers")
    own = {"saelens_asi": package_version(), "python": platform.python_version()}
    return {**own, **{name: version(name) for name in packages}}


@contextmanager
def losses_named(world: Group, way_out: Callable[[], str]) -> Iterator[None]:
    """Say which process is gone where others wait for it in vain, and how to go on.

    Args:
        world: all processes.
        way_out: what to do next, in words.

    Raises:
        ChildProcessError: in place of what the engine of torch.distributed raises then.
    """
    if world.size == 1:
        yield
        return
    places = world.gather_objects((socket.gethostname(), os.getpid()))
    try:
        yield
    except _LOST as error:
        if not is_loss(error):
            raise
        message = f"{_lost(places)} ended, and all others with it. {way_out()}"
        logger.error(message)  # now: torchrun is about to end this process too
        raise ChildProcessError(message) from error


def is_loss(error: BaseException) -> bool:
    """Whether an error is that of a process which waits for one that is gone. gloo has no class of its own for it."""
    said = str(error).lower()
    words = ("closed by peer", "connection reset", "connection refused", "timed out", "timeout", "nccl", "broken pipe")
    is_plain = isinstance(error, RuntimeError) and any(word in said for word in words)
    return isinstance(error, dist.DistError) or is_plain


def _lost(places: list[tuple[str, int]]) -> str:
    """Which process is gone, in words. One that fails closes its connections, and ends some time after that."""
    here = socket.gethostname()
    others = sorted({host for host, _ in places} - {here})
    end = time.monotonic() + _LAST_WORDS
    while time.monotonic() < end:
        gone = [rank for rank, (host, pid) in enumerate(places) if host == here and _is_gone(pid)]
        if gone:
            return f"process {', '.join(map(str, gone))} of {len(places)} (on {here})"
        time.sleep(0.02)
    return f"a process of {len(places)} (on {', '.join(others or [here])})"


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:
        return False
