"""Activations of a model on disk: one pass over text for any number of hooks, read back without loading them."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import numpy as np
import torch
import xxhash
from torch import Tensor

from saelens_asi.activations.fingerprint import check_fingerprints, fingerprints, sealed, unsealed
from saelens_asi.activations.hooks import HookedModel, hook_points
from saelens_asi.activations.reader import TextPass
from saelens_asi.activations.tokens import TokenData
from saelens_asi.interrupts import signals_held_back
from saelens_asi.resume import differences, one_writer, write_json

_STATE = "cache.json"
_SAVE_SECONDS = 30
_CHUNK = 1 << 24  # bytes read at a time for a checksum


def cache_activations(
    folder: str | Path,
    model: HookedModel | Callable[[], HookedModel],
    data: TokenData | Callable[[], TokenData],
    hook_names: str | Iterable[str],
    n_tokens: int,
    *,
    batch_size: int = 32,
    context_size: int = 128,
    exclude_special_tokens: bool | Sequence[int] = True,
    dtype: Literal["float32", "float16"] = "float32",
    progress: bool = True,
    verify: bool = True,
) -> dict[str, Tensor]:
    """Write (n_tokens, width) activations of each hook to ``folder``, and return them.

    The tensors are views of the files: they take no memory until they are read, and are not to be written to. A pass
    that was interrupted, by SIGKILL too, continues where it was last saved, to the same bits; SIGINT and SIGTERM let
    the batch end, and save it. One that is complete is read back without the model.

    The folder knows of which model, data and settings it was made, and refuses others. Where ``model`` or ``data`` is a
    function, it is compared only where it is called.

    Args:
        folder: one for each model, dataset and n_tokens.
        model: a HookedTransformer or TransformerBridge, or a function that returns one, called only where it is needed.
        data: token ids or rows of a dataset, as ``activation_spectra`` takes them, or a function that returns them.
        hook_names: names, aliases or patterns, as in ``model.hook_dict``.
        n_tokens: activations of each hook. Where the data ends before, there are fewer, and the log says so.
        batch_size: windows in one forward pass.
        context_size: tokens in a window.
        exclude_special_tokens: leave out BOS, EOS, padding and the like: True, False or token ids.
        dtype: of the files: float16 takes half the disk, for activations below 65,504.
        progress: show a progress bar.
        verify: read a complete cache once, to compare its checksums. False looks at sizes and headers alone.

    Raises:
        ValueError: for a folder that was written with other settings, from another model or other data, or that another
            process writes to; for a damaged one; for a hook that does not exist, or data without tokens that count; for
            activations that float16 does not hold.
        OSError: where the disk is full. What was saved before stays.
    """
    _check(n_tokens, dtype)
    folder = Path(folder)
    names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
    settings = {
        "hook_names": names,
        "n_tokens": n_tokens,
        "batch_size": batch_size,
        "context_size": context_size,
        "exclude_special_tokens": exclude_special_tokens,
        "dtype": dtype,
    }
    state = _read_state(folder, settings)
    loaded: Any = model if hasattr(model, "hook_dict") or not callable(model) else None
    rows: Any = None if callable(data) else data
    if state.complete:
        state.check(folder, loaded, rows)
    else:
        loaded = cast(Callable[[], HookedModel], model)() if loaded is None else loaded
        rows = data() if callable(data) else data
        points = hook_points(loaded, names)
        state.check(folder, loaded, rows)
        text = TextPass(
            loaded,
            rows,
            points,
            n_tokens,
            batch_size=batch_size,
            context_size=context_size,
            exclude_special_tokens=exclude_special_tokens,
        )
        with one_writer(folder, "folder"), _Files(folder, state, n_tokens) as files:
            files.fill(text, progress)
        verify = False  # what was written just now, and compared before where it was there
    return {name: _read_back(folder, name, state, n_tokens, verify) for name in state.files}


def _check(n_tokens: int, dtype: str) -> None:
    if n_tokens < 1:
        raise ValueError(f"n_tokens={n_tokens} must be at least 1")
    if dtype not in _DESCRIPTIONS:
        raise ValueError(f"dtype={dtype!r} must be one of {list(_DESCRIPTIONS)}")


# Of NumPy, in the header of a file, by name.
_DESCRIPTIONS = {"float32": "<f4", "float16": "<f2"}


@dataclass
class _State:
    """What ``cache.json`` holds.

    Attributes:
        settings: of the pass.
        files: from hooks to names of files.
        n_batches: that have been read.
        n_kept: rows of each file that count.
        complete: whether no more come.
        fingerprints: of the model and the data; None in the files of earlier versions, like the next two.
        digest: of all tokens read.
        checksums: from hooks to those of their rows so far.
    """

    settings: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    n_batches: int = 0
    n_kept: int = 0
    complete: bool = False
    fingerprints: dict[str, str | None] | None = None
    digest: str | None = None
    checksums: dict[str, str] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(_DESCRIPTIONS[self.settings.get("dtype", "float32")])

    def check(self, folder: Path, model: Any, data: Any) -> None:
        """Compare the fingerprints of what there is, and take over those that the folder has not. None is unknown."""
        now = fingerprints(model, data)
        self.fingerprints = check_fingerprints(self.fingerprints, now, folder, "give that, or another folder")


def _read_state(folder: Path, settings: dict[str, Any]) -> _State:
    path = folder / _STATE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file: give the folder of a cache, or a new one")
    if not path.exists():
        return _State(settings, fingerprints={})
    try:
        state = _State(**unsealed(json.loads(path.read_text())))
    except (OSError, ValueError, TypeError) as error:
        _refuse(folder, f"{_STATE} is damaged: {error}")
    wrong = [one.name for one in fields(_State) if not isinstance(getattr(state, one.name), _TYPES[one.name])]
    if wrong or not all(isinstance(file, str) for file in state.files.values()):
        _refuse(folder, f"{_STATE} is damaged: {wrong or ['files']} is of another type")
    saved = {"dtype": "float32", **state.settings}  # which earlier versions did not note
    changed = differences({name: saved.get(name) for name in settings}, settings)
    if changed:
        raise ValueError(f"{folder} holds other activations ({changed}): use those settings, or another folder")
    return state


_TYPES: dict[str, tuple[type, ...]] = {
    "settings": (dict,),
    "files": (dict,),
    "n_batches": (int,),
    "n_kept": (int,),
    "complete": (bool,),
    "fingerprints": (dict, type(None)),
    "digest": (str, type(None)),
    "checksums": (dict, type(None)),
}


def _refuse(folder: Path, reason: str) -> NoReturn:
    raise ValueError(f"folder={str(folder)!r}: {reason}. Delete the folder to read the activations anew")


def _header(n_rows: int, width: int, dtype: np.dtype[Any]) -> bytes:
    """What a .npy file of (n_rows, width) begins with."""
    buffer = BytesIO()
    shape = {"descr": dtype.str, "fortran_order": False, "shape": (n_rows, width)}
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()


def _width_of(folder: Path, file: str, n_rows: int, dtype: np.dtype[Any]) -> int:
    """Width of the rows in a file of the cache. Raises ValueError for one whose size or header is another."""
    path = folder / file
    if not path.is_file():
        _refuse(folder, f"{file} is {'no file' if path.exists() else 'missing'}")
    size = path.stat().st_size
    width = (size - len(_header(n_rows, 1, dtype))) // (dtype.itemsize * n_rows)
    header = _header(n_rows, max(width, 0), dtype)
    if width < 1 or size != len(header) + dtype.itemsize * n_rows * width:
        _refuse(folder, f"{file} has {size} bytes, which is no array of {n_rows} rows: it was cut or replaced")
    with path.open("rb") as opened:
        if opened.read(len(header)) != header:
            _refuse(folder, f"{file} does not begin as an array of ({n_rows}, {width}) {dtype} does")
    return width


def _digest_of_rows(folder: Path, file: str, width: int, state: _State, n_rows: int) -> xxhash.xxh3_128:
    digest, left = xxhash.xxh3_128(), state.dtype.itemsize * state.n_kept * width
    with (folder / file).open("rb") as opened:
        opened.seek(len(_header(n_rows, width, state.dtype)))
        while left and (chunk := opened.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest


def _check_rows(folder: Path, name: str, state: _State, width: int, n_rows: int) -> xxhash.xxh3_128:
    """The checksum of a hook's rows. Raises ValueError where it is not the one that the state knows."""
    file = state.files[name]
    if not 0 <= state.n_kept <= n_rows:
        _refuse(folder, f"{_STATE} counts {state.n_kept} of {n_rows} rows")
    digest = _digest_of_rows(folder, file, width, state, n_rows)
    if state.checksums is not None and digest.hexdigest() != state.checksums.get(name):
        _refuse(folder, f"the content of {file} has changed since it was written: its checksum differs")
    return digest


def _read_back(folder: Path, name: str, state: _State, n_rows: int, verify: bool) -> Tensor:
    """(n_kept, width) as a view of the file. Raises ValueError for a file that the state does not fit."""
    width = _width_of(folder, state.files[name], n_rows, state.dtype)
    if verify:
        _check_rows(folder, name, state, width, n_rows)
    offset = len(_header(n_rows, width, state.dtype))
    array = np.memmap(folder / state.files[name], state.dtype, "c", offset, (n_rows, width))
    return torch.from_numpy(array[: state.n_kept])


class _Files:
    """The files of a cache, which grow with a pass. Written by calls: a full disk is an error, not a signal."""

    def __init__(self, folder: Path, state: _State, n_rows: int) -> None:
        self.folder, self.state, self.n_rows = folder, state, n_rows
        self.files: dict[str, FileIO] = {}
        self._digests: dict[str, xxhash.xxh3_128] = {}
        self._open = ExitStack()

    def __enter__(self) -> _Files:
        for name, file in self.state.files.items():
            width = _width_of(self.folder, file, self.n_rows, self.state.dtype)
            self._digests[name] = _check_rows(self.folder, name, self.state, width, self.n_rows)
            self.files[name] = self._open.enter_context(FileIO(self.folder / file, "r+"))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def fill(self, text: TextPass, progress: bool) -> None:
        self._skip(text)
        readers = {name: self._writer(name, text) for name in text.points}
        saved_at, n_saved = time.monotonic(), self.state.n_batches
        with signals_held_back() as stopped:
            try:
                for _ in text.read(readers, description="Caching activations", progress=progress):
                    self._take_over(text)
                    if stopped():
                        break
                    if time.monotonic() - saved_at > _SAVE_SECONDS:
                        self._save()
                        saved_at, n_saved = time.monotonic(), self.state.n_batches
            except BaseException as error:
                if self.state.n_batches > n_saved:
                    with suppress(OSError):
                        self._save()
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise self._disk_full() from None
                raise
            if not stopped():
                text.check_length()
            self.state.complete = not stopped()
            try:
                self._save()
            except OSError as error:
                raise (self._disk_full() if error.errno == errno.ENOSPC else error) from None

    def _skip(self, text: TextPass) -> None:
        text.skip(self.state.n_batches, self.state.n_kept)
        if self.state.digest not in (None, text.digest.hexdigest()):
            raise ValueError(f"{self.folder} was written while reading other data: give that data, or another folder")

    def _take_over(self, text: TextPass) -> None:
        """What of a batch the state holds: after it, for all hooks at once."""
        self.state.n_kept, self.state.n_batches = text.n_read, text.n_batches
        self.state.digest = text.digest.hexdigest()
        self.state.checksums = {name: digest.hexdigest() for name, digest in self._digests.items()}
        self.state.files = {name: f"{name}.npy" for name in self.files}

    def _writer(self, name: str, text: TextPass) -> Callable[[Tensor], None]:
        def write(vectors: Tensor) -> None:
            dtype = self.state.dtype
            header, row_bytes = _header(self.n_rows, vectors.shape[1], dtype), dtype.itemsize * vectors.shape[1]
            if name not in self.files:
                file = self._open.enter_context(FileIO(self.folder / f"{name}.npy", "w+"))
                _write(file, header)
                file.truncate(len(header) + self.n_rows * row_bytes)
                self.files[name], self._digests[name] = file, xxhash.xxh3_128()
            values = vectors.float().cpu()
            if dtype.itemsize == 2 and not (values.abs() <= torch.finfo(torch.float16).max).all():
                raise ValueError(f"activations of {name} reach {values.abs().max():g}: dtype='float16' ends at 65,504")
            content = values.numpy().astype(dtype).tobytes()
            self.files[name].seek(len(header) + text.n_read * row_bytes)
            _write(self.files[name], content)
            self._digests[name].update(content)

        return write

    def _save(self) -> None:
        """The activations first: what the state counts must be there."""
        for file in self.files.values():
            os.fsync(file.fileno())
        write_json(self.folder / _STATE, sealed(asdict(self.state)), indent=1)

    def _disk_full(self) -> OSError:
        message = f"no space left for folder={str(self.folder)!r}: what was saved stays, the same call goes on from it"
        return OSError(errno.ENOSPC, message)


def _write(file: FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
