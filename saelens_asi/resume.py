"""What interrupted work goes on from: files and folders that are whole or not there, tensors that give equal bits."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saelens_asi.sparse.shards import ALONE, Group

MANIFEST = "manifest.json"
LOCK, WRITER = ".writer.lock", ".writer.json"

# Endings of the hidden names that a folder has until it is whole, or until the one in its place is.
_UNFINISHED, _REPLACED = ".tmp", ".old"

# What a disk that is full, or gone, raises: Python, torch's writer and safetensors each say it in their own way.
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)

# Of the time of a run that its checkpoints may take.
_SHARE_OF_TIME = 0.01

_CHUNK = 1 << 24  # bytes read at a time for a checksum

# How torch.distributed.checkpoint names the files of a process.
_OF_A_PROCESS = re.compile(r"__(\d+)_")


class ElsewhereError(OSError):
    """What another process of a group failed with.

    Attributes:
        of_disk: whether that was one of ``DISK_ERRORS``, after which a run can go on.
    """

    def __init__(self, message: str, of_disk: bool) -> None:
        super().__init__(message)
        self.of_disk = of_disk


@contextmanager
def failing_together(group: Group, undo: Callable[[], None] | None = None) -> Iterator[None]:
    """A block that ends with an error in all processes of a group where it does in one.

    None leaves the block before all are at its end. What stands in it is each process's own: between two calls to the
    group an error of one would leave the others waiting.

    Args:
        group: of the processes that come here.
        undo: called after an error, and done in all processes when it is raised.

    Raises:
        ElsewhereError: for an error of others, with the rank and the error of the first of them. A process that has an
            error of its own raises that.
    """
    own: BaseException | None = None
    try:
        yield
    except BaseException as error:
        own = error
    told = None if own is None else (f"{type(own).__name__}: {own}", isinstance(own, DISK_ERRORS))
    failures = {rank: failure for rank, failure in enumerate(group.gather_objects(told)) if failure is not None}
    if failures and undo is not None:
        undo()
        group.gather_objects(None)
    if own is not None:
        raise own
    for rank, (error_there, of_disk) in failures.items():
        raise ElsewhereError(f"process {rank} of {group.size} failed: {error_there}", of_disk)


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the block has ended well.

    A reader sees the old file or the new one, never a part, also after a crash: the content is synced before the
    rename. After an error the old file stays, and nothing else is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Strict JSON and a line break, whole or not at all; options of ``json.dumps``."""
    text = json.dumps(value, allow_nan=False, **options) + "\n"
    with written_whole(path) as unfinished:
        unfinished.write_text(text)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as unfinished:
        save_file(own, unfinished, metadata=None if metadata is None else dict(metadata))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, in memory that torch allocated.

    A file's memory is not aligned as torch's is. MKL then adds in another order on some processors, and what continues
    from such a tensor differs in the last bit: hence the copies.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict


def tensor_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors."""
    with _opened(path) as file:
        return file.metadata() or {}


def _opened(path: str | Path) -> Any:
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from None


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``name was 1 and is 2; ...`` for settings that differ once written as JSON; empty where none do."""
    now = json.loads(json.dumps(dict(now)))
    names = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    return "; ".join(f"{name} was {saved.get(name)!r} and is {now.get(name)!r}" for name in names)


@contextmanager
def folder_written_whole(path: str | Path, facts: Mapping[str, Any], group: Group = ALONE) -> Iterator[Path]:
    """A temporary folder beside ``path``, which takes its name when the block has ended well.

    All files are synced, and listed in a manifest with their sizes and checksums, before that: a folder whose manifest
    fits (see ``damage``) is whole, whatever it is called. After an error nothing of it is left.

    Several processes write to one folder, which all of them reach. A file whose name begins with ``__RANK_`` is synced
    and read again for its checksum by the process of that rank, all others by the first.

    Args:
        path: of the folder; what is there under that name is replaced.
        facts: what the manifest tells beside its files, as JSON; the first process's.
        group: of the processes that write. None goes on before the folder is whole, or gone.

    Raises:
        ElsewhereError: for an error of another process.
    """
    path = Path(path)
    owner = group.of_first(os.getpid())
    unfinished = path.with_name(f".{path.name}.{owner}{_UNFINISHED}")
    replaced = path.with_name(f".{path.name}.{owner}{_REPLACED}")

    def remove() -> None:
        if group.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)

    try:
        with failing_together(group, remove):
            if group.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
        with failing_together(group, remove):
            yield unfinished
        own: dict[str, Any] = {}
        with failing_together(group, remove):
            own = {name: _synced(unfinished / name) for name in _file_names(unfinished) if _is_own(name, group)}
        files = {name: file for files in group.gather_objects(own) for name, file in files.items()}
        with failing_together(group, remove):
            if group.is_first:
                write_json(unfinished / MANIFEST, {**facts, "files": dict(sorted(files.items()))}, indent=1)
                _put_in_place(unfinished, path, replaced)
            remove()
    finally:
        remove()


def _is_own(name: str, group: Group) -> bool:
    """Whether this process is the one that syncs a file."""
    of_a_process = _OF_A_PROCESS.match(Path(name).name)
    rank = int(of_a_process[1]) if of_a_process else 0
    return group.rank == (rank if rank < group.size else 0)


def _put_in_place(unfinished: Path, path: Path, replaced: Path) -> None:
    for folder in (unfinished, *(one for one in unfinished.rglob("*") if one.is_dir())):
        _sync_folder(folder)
    if path.exists():
        path.replace(replaced)
    unfinished.replace(path)
    _sync_folder(path.parent)


def is_unfinished(name: str) -> bool:
    """Whether a folder of this name was never whole, or was being replaced, when its process was killed."""
    return name.startswith(".") and name.endswith((_UNFINISHED, _REPLACED))


def remove_unfinished(folder: Path) -> None:
    """Remove what processes left in a folder that were killed while they wrote; for its only writer to call."""
    for path in folder.glob(".*"):
        if path.is_dir() and is_unfinished(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _file_names(folder: Path) -> list[str]:
    files = (one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file())
    return sorted(name for name in files if name != MANIFEST)


def _synced(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # where a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: str | Path) -> str:
    """xxh3_128 of a file's bytes, as hexadecimal digits: it finds damage, not forgery."""
    digest = xxhash.xxh3_128()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """What the manifest of a folder tells; None where there is none that can be read: such a folder is not whole."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def damage(folder: str | Path) -> str | None:
    """What of a folder does not fit its manifest, in words; None for a folder that is whole."""
    folder, manifest = Path(folder), read_manifest(folder)
    if manifest is None:
        return f"it has no {MANIFEST} that can be read"
    try:
        differing = (_difference(folder / name, name, listed) for name, listed in manifest["files"].items())
        return next((difference for difference in differing if difference is not None), None)
    except (OSError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be followed ({type(error).__name__}: {error})"


def _difference(path: Path, name: str, listed: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != listed["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, not {listed['bytes']}"
    return f"the checksum of {name} differs" if checksum(path) != listed["xxh3_128"] else None


def check_writable(setting: str, folder: str | Path) -> None:
    """Make a folder where it is not there. Raises ValueError, naming the setting, where it cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{setting}={str(folder)!r} cannot be written to ({error}): give another folder") from None


class CheckpointClock:
    """When a checkpoint by time is due.

    Attributes:
        minutes: between two, and longer where they would take over 1 % of the time; 0: never.
        seconds_of_last: what the last one took.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes, self.seconds_of_last = minutes, 0.0
        self.start()

    def start(self) -> None:
        """The time to the next checkpoint begins now."""
        self._started = time.monotonic()

    def is_due(self) -> bool:
        wait = max(60 * self.minutes, self.seconds_of_last / _SHARE_OF_TIME)
        return self.minutes > 0 and time.monotonic() - self._started >= wait

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the writing of a checkpoint: what it takes counts where it ends well."""
        began = time.monotonic()
        try:
            yield
            self.seconds_of_last = time.monotonic() - began
        finally:
            self.start()


@contextmanager
def one_writer(folder: str | Path, setting: str) -> Iterator[None]:
    """Hold a folder for this process; the operating system lets it go when the process ends, however it ends.

    Args:
        folder: made where it is not there.
        setting: what named the folder, for the error.

    Raises:
        ValueError: while another run writes there; names its host, process and start.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{setting}={str(folder)!r} is being written by {_writer(folder)}: wait for it to end, stop it, or set "
            f"{setting} to another folder"
        ) from None
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        write_json(folder / WRITER, {"host": socket.gethostname(), "pid": os.getpid(), "started": started})
        yield
    finally:
        (folder / WRITER).unlink(missing_ok=True)
        lock.release()


def _writer(folder: Path) -> str:
    try:
        writer = json.loads((folder / WRITER).read_text())
        return f"process {writer['pid']} on {writer['host']} since {writer['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
