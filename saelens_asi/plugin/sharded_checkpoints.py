"""Checkpoints of an SAE whose features are spread over processes: all write at once, and any number reads.

The engine is ``torch.distributed.checkpoint``, as single processes write it too. What it holds at a time of a large
tensor is a chunk: it copies what does not fill its storage, and reads back whole what it wrote as one.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sae_lens.constants import SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Sharded
from torch.optim import Optimizer

from saelens_asi.activations.sae_state import feature_dim
from saelens_asi.plugin.fields import AnyTrainingSAE
from saelens_asi.resume import DISK_ERRORS, failing_together, written_whole
from saelens_asi.sparse.shards import Shard, bounds

SHARDS = "shards"

# Bytes of a tensor that are copied, sent or written at a time.
_CHUNK = 1 << 24

# What an optimizer has of a parameter only with some of its options.
_OPTIONAL = ("row_step", "last_step")

# Shape and dtype of a tensor; no dtype for one that torch's tensors of a checkpoint never have.
_Facts: TypeAlias = tuple[tuple[int, ...], torch.dtype | None]

# Safetensors' names of dtypes, in the order in which its own writer places tensors: no number is misaligned.
_DTYPES = {
    **{torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16"},
    **{torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"},
}


@dataclass(frozen=True)
class ShardedTensors:
    """All tensors that training moves, as they lie in this process.

    Attributes:
        tensors: by name: ``sae.W_enc``, ``optimizer.W_enc.exp_avg``, ``counters.act_freq_scores``.
        dims: of each, the dimension along which its features lie; None for one that is equal in all processes.
        groups: names of the parameters in each of the optimizer's groups.
    """

    tensors: Mapping[str, Tensor]
    dims: Mapping[str, int | None]
    groups: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, sae: AnyTrainingSAE, optimizer: Optimizer, counters: Mapping[str, Tensor]) -> ShardedTensors:
        """Those of a training under way; written to in place, they are the training's.

        Args:
            sae: with the features of this process.
            optimizer: of its parameters. One that has not stepped has no state: see ``make_room_``.
            counters: by the names that SAELens's trainer state has for them, (n_features,) or of any other shape.
        """
        n_features = sae.W_dec.shape[0]
        params = {param: name for name, param in sae.named_parameters()}
        tensors, dims = {}, {}

        def add(name: str, tensor: Tensor, dim: int | None) -> None:
            tensors[name], dims[name] = tensor.detach(), dim

        for name, tensor in sae.state_dict().items():
            add(f"sae.{name}", tensor, feature_dim(name, tensor, n_features))
        for param, state in optimizer.state.items():
            of_param = feature_dim(params[param], param, n_features)
            for key, tensor in state.items():
                of_row = 0 if tensor.ndim == 1 and of_param is not None else None
                add(f"optimizer.{params[param]}.{key}", tensor, of_param if tensor.shape == param.shape else of_row)
        for name, tensor in counters.items():
            add(f"counters.{name}", tensor, feature_dim(name, tensor, n_features))
        groups = tuple(tuple(params[param] for param in group["params"]) for group in optimizer.param_groups)
        return cls(tensors, dims, groups)

    def by_row(self, shard: Shard) -> dict[str, Tensor]:
        """Features first, as they are written: tensors in this process's memory, of which DTensors know the others.

        Raises:
            ValueError: for a tensor on another device than the mesh is of, or without this process's features.
        """
        return {name: _by_row(name, tensor, self.dims[name], shard) for name, tensor in self.tensors.items()}


def _by_row(name: str, tensor: Tensor, dim: int | None, shard: Shard) -> Tensor:
    if dim is None:
        return tensor
    rows = tensor.movedim(dim, 0)
    if rows.shape[0] != shard.n_features:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has {rows.shape[0]} features along dimension {dim}, and this "
            f"process holds {shard.n_features} of {shard.d_sae}"
        )
    if shard.mesh is None:
        return rows
    if rows.device.type != shard.mesh.device_type:
        raise ValueError(f"{name} lies on {rows.device}, and the mesh of processes is of {shard.mesh.device_type}")
    shape = torch.Size((shard.d_sae, *rows.shape[1:]))
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    placements = [Replicate(), Sharded(0)]
    return DTensor.from_local(rows, shard.mesh, placements, run_check=False, shape=shape, stride=strides)


class _InChunks(DefaultSavePlanner):
    """Writes a tensor as several, of at most ``_CHUNK`` bytes each: the engine copies and reads one at a time."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._first_rows: dict[str, int] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[chunk for item in plan.items for chunk in self._chunks(item)])
        return self.plan

    def _chunks(self, item: WriteItem) -> Iterator[WriteItem]:
        data = item.tensor_data
        if data is None or not data.size:
            yield item
            return
        (first, *others), (n, *row) = data.chunk.offsets, data.chunk.sizes
        self._first_rows[item.index.fqn] = first
        for lo, hi in _stretches(n, math.prod(row) * data.properties.dtype.itemsize):
            offsets = torch.Size((first + lo, *others))
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size((hi - lo, *row)))
            index = MetadataIndex(item.index.fqn, offsets)
            yield replace(item, index=index, type=WriteItemType.SHARD, tensor_data=replace(data, chunk=chunk))

    def resolve_data(self, write_item: WriteItem) -> Any:
        tensor = self.state_dict[write_item.index.fqn]
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if write_item.tensor_data is None or not local.ndim:
            return local
        chunk = write_item.tensor_data.chunk
        return local.narrow(0, chunk.offsets[0] - self._first_rows[write_item.index.fqn], chunk.sizes[0])


def _stretches(n: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """From where to where n rows are taken at a time: at least one, and no more than a chunk."""
    step = max(1, _CHUNK // max(1, row_bytes))
    return ((lo, min(n, lo + step)) for lo in range(0, n, step))


def write_shards(folder: str | Path, tensors: ShardedTensors, shard: Shard) -> None:
    """Write what all processes hold to ``folder / "shards"``, each its own part; called by all of them.

    What several hold alike is written once, and shared among them by size. A file is named ``__RANK_0.distcp``.

    Raises:
        OSError: for a disk that is full or gone, in all processes; names the rank and its error.
        ValueError: for anything else that went wrong.
    """
    with failing_together(shard.world):
        state = tensors.by_row(shard)
        (Path(folder) / SHARDS).mkdir(parents=True, exist_ok=True)
    with _said_of_ranks(f"the shards of {folder} cannot be written"):
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(Path(folder) / SHARDS),
            planner=_InChunks(),
            process_group=shard.world.handle,
        )


def read_shards(folder: str | Path, tensors: ShardedTensors, shard: Shard) -> frozenset[str]:
    """Read what ``write_shards`` wrote, with this or any other number of processes, in place; called by all of them.

    A process reads the chunks that its features are in, one at a time.

    Returns:
        Names of those of the optimizer's tensors that only some options have, and the checkpoint has not; they stay
        as they are.

    Raises:
        ValueError: where there are no shards that can be read, or one is missing, or of another shape or dtype, all of
            which it names; in all processes.
    """
    with failing_together(shard.world):
        state = tensors.by_row(shard)
        saved = _saved_shards(Path(folder))
        left_out = _check_fit(folder, {name: _facts(one) for name, one in state.items()}, saved, bool(tensors.groups))
    with _said_of_ranks(f"the shards of {folder} cannot be read", of_disk=ValueError):
        dcp.load(
            {name: tensor for name, tensor in state.items() if name not in left_out},
            storage_reader=dcp.FileSystemReader(Path(folder) / SHARDS),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=shard.world.handle,
        )
    return left_out


def _saved_shards(folder: Path) -> dict[str, _Facts]:
    """Of all tensors, features first."""
    try:
        found = dcp.FileSystemReader(folder / SHARDS).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{folder} has no shards that can be read ({type(error).__name__}: {error})") from None
    tensors = {name: one for name, one in found.items() if isinstance(one, TensorStorageMetadata)}
    return {name: (tuple(one.size), one.properties.dtype) for name, one in tensors.items()}


def _check_fit(
    folder: str | Path, asked: Mapping[str, _Facts], saved: Mapping[str, _Facts], of_training: bool
) -> frozenset[str]:
    """Raise ValueError unless a checkpoint has what is asked for; returns names of what it need not have, and lacks.

    Of a training, moments that it has have to be asked for.
    """
    missing, unasked = asked.keys() - saved.keys(), saved.keys() - asked.keys()
    optional = frozenset(name for name in missing if name.endswith(_OPTIONAL))
    problems = [f"{name} is missing" for name in sorted(missing - optional)]
    for name in sorted(asked.keys() & saved.keys()):
        if asked[name] != saved[name]:
            (shape, dtype), (saved_shape, saved_dtype) = asked[name], saved[name]
            problems.append(f"{name} is {saved_dtype} of shape {saved_shape}, not {dtype} of shape {shape}")
    moments = sorted(name for name in unasked if name.startswith("optimizer.") and not name.endswith(_OPTIONAL))
    if of_training and moments:
        problems.append(f"the optimizer has no room for {', '.join(moments)}: call make_room_ first")
    if problems:
        raise ValueError(f"{folder} does not fit: {'; '.join(problems)}")
    return optional


@contextmanager
def _said_of_ranks(what: str, of_disk: type[Exception] = OSError) -> Iterator[None]:
    """The engine's exception, which is no Exception, as one that is, in the words of the processes that failed."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        told = "; ".join(f"process {rank}: {type(one).__name__}: {one}" for rank, one in failures.items())
        is_of_disk = all(isinstance(one, DISK_ERRORS) for one in failures.values())
        raise (of_disk if is_of_disk else ValueError)(f"{what} ({told})") from next(iter(failures.values()), None)


def make_room_(sae: AnyTrainingSAE, optimizer: Optimizer, folder: str | Path) -> None:
    """Give an optimizer the state that a checkpoint has for it, zeros to read into: what an option adds or lacks, too.

    Args:
        sae: with the features of this process; names the parameters.
        optimizer: of its parameters.
        folder: with shards, or with what one process wrote.

    Raises:
        ValueError: where neither can be read.
    """
    folder, params = Path(folder), dict(sae.named_parameters())
    if (folder / SHARDS).is_dir():
        saved = _saved_shards(folder)
    else:
        groups = ShardedTensors.of(sae, optimizer, {}).groups
        saved = {name: _facts(one) for name, one in _stock_state(folder, groups).items()}
    optimizer.state.clear()
    for name, (shape, dtype) in saved.items():
        room, _, rest = name.partition(".")
        param_name, _, key = rest.rpartition(".")
        if room == "optimizer" and param_name in params:
            state = optimizer.state[params[param_name]]
            state[key] = _room(params[param_name], key, len(shape), dtype, optimizer)


def _room(param: Tensor, key: str, n_dims: int, dtype: torch.dtype | None, optimizer: Optimizer) -> Tensor:
    if key in _OPTIONAL:
        options = next(group for group in optimizer.param_groups if any(one is param for one in group["params"]))
        return torch.zeros(param.shape[options.get("row_dim") or 0], dtype=dtype, device=param.device)
    if n_dims == 0:  # a count of steps, which optimizers keep on the CPU unless they are told otherwise
        on_device = optimizer.defaults.get("capturable") or optimizer.defaults.get("fused")
        return torch.zeros((), dtype=dtype, device=param.device if on_device else "cpu")
    return torch.zeros_like(param, dtype=dtype, requires_grad=False)


def read_stock(folder: str | Path, tensors: ShardedTensors, shard: Shard) -> frozenset[str]:
    """Read what one process wrote, SAELens's files, in place; each process its own rows alone, called by all.

    Returns and raises what ``read_shards`` does.
    """
    folder = Path(folder)
    with failing_together(shard.world), torch.no_grad(), _weights(folder) as file:
        state = _stock_state(folder, tensors.groups)
        saved = {name: _facts(one) for name, one in state.items()}
        saved |= {f"sae.{name}": _slice_facts(file, name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        dims, own = tensors.dims, tensors.tensors
        asked: dict[str, _Facts] = {n: (_whole_shape(one, dims[n], shard), one.dtype) for n, one in own.items()}
        left_out = _check_fit(folder, asked, saved, bool(tensors.groups))
        for name in own.keys() - left_out:
            room, _, rest = name.partition(".")
            source = state[name] if room != "sae" else file.get_slice(rest) if own[name].ndim else file.get_tensor(rest)
            _copy_own_(own[name], source, dims[name], shard)
    return left_out


def _facts(tensor: Tensor) -> _Facts:
    return tuple(tensor.shape), tensor.dtype


def _copy_own_(tensor: Tensor, source: Any, dim: int | None, shard: Shard) -> None:
    """Copy this process's features of a whole tensor, or of what slices one from a file, a chunk at a time."""
    if not tensor.ndim:
        tensor.copy_(source)
        return
    for lo, hi in _stretches(tensor.shape[0], math.prod(tensor.shape[1:]) * tensor.dtype.itemsize):
        first = shard.first if dim == 0 else 0
        place = [slice(first + lo, first + hi), *[slice(None)] * (tensor.ndim - 1)]
        if dim:
            place[dim] = slice(shard.first, shard.stop)
        tensor[lo:hi].copy_(source[tuple(place)])


def _whole_shape(tensor: Tensor, dim: int | None, shard: Shard) -> tuple[int, ...]:
    return tuple(shard.d_sae if i == dim else size for i, size in enumerate(tensor.shape))


@contextmanager
def _weights(folder: Path) -> Iterator[Any]:
    try:
        opened = safe_open(folder / SAE_WEIGHTS_FILENAME, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / SAE_WEIGHTS_FILENAME} cannot be read: {error}") from None
    with opened as file:
        yield file


def _slice_facts(file: Any, name: str) -> _Facts:
    part = file.get_slice(name)
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    return tuple(part.get_shape()), dtypes.get(part.get_dtype())


def _stock_state(folder: Path, groups: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """The tensors of SAELens's trainer state, by the names of ``ShardedTensors``; what is not looked at is not read."""
    path = folder / TRAINER_STATE_FILENAME
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        counters = {f"counters.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        saved_groups, by_param = state["optimizer"]["param_groups"], state["optimizer"]["state"]
        sizes = [len(group["params"]) for group in saved_groups]
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if sizes != [len(names) for names in groups]:
        raise ValueError(
            f"{path} is of an optimizer with groups of {sizes} parameters, not {[len(names) for names in groups]}: "
            "resume with the optimizer that wrote it"
        )
    names = [name for group in groups for name in group]
    saved_ids = [i for group in saved_groups for i in group["params"]]
    moments = {
        f"optimizer.{name}.{key}": torch.as_tensor(value)
        for i, name in zip(saved_ids, names, strict=True)
        for key, value in by_param.get(i, {}).items()
    }
    return {**counters, **moments}


def write_whole(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    dims: Mapping[str, int | None],
    shard: Shard,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file of the whole tensors, to the byte what ``save_file`` writes; called by all processes.

    The first writes it in the file's order, whole or not at all; it alone reaches the folder, and holds a chunk at a
    time of what the others send. Of processes with equal features those with the first tokens send.

    Args:
        path: of the file.
        tensors: this process's parts, (..., n_features, ...).
        dims: of each, the dimension along which its features lie; None for one that is equal in all processes.
        shard: which features these are.
        metadata: of the file.

    Raises:
        ValueError: for a dtype that the format has not.
        OSError: for a disk that is full or gone, in all processes.
    """
    names = _placed(tensors)
    with failing_together(shard.world), ExitStack() as stack:
        file: BinaryIO | None = None
        with failing_together(shard.world):
            if shard.world.is_first:
                file = stack.enter_context(stack.enter_context(written_whole(path)).open("wb"))
                shapes = {name: _whole_shape(tensors[name], dims[name], shard) for name in names}
                file.write(_header(shapes, {name: tensors[name].dtype for name in names}, metadata))
        sink = _Sink(file)
        if shard.tokens.is_first:
            for name in names:
                _stream(tensors[name].detach(), dims[name], shard, sink.write)
        sink.finish()


class _Sink:
    """A file that takes all it is given, also after an error: those who send are not left waiting."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, tensor: Tensor) -> None:
        if self._file is None or self._error is not None:
            return
        try:
            self._file.write(_as_bytes(tensor).numpy().data)
        except OSError as error:
            self._error = error

    def finish(self) -> None:
        if self._error is not None:
            raise self._error
        if self._file is not None:
            self._file.flush()


def _placed(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of safetensors' own writer: wide numbers first, then by name."""
    order = list(_DTYPES)
    for name, tensor in tensors.items():
        if tensor.dtype not in order:
            raise ValueError(f"{name} is {tensor.dtype}, which is none of {', '.join(_DTYPES.values())}")
    return sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))


def _header(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str] | None
) -> bytes:
    """Length and JSON, padded so that numbers are aligned."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        entries[name] = {"dtype": _DTYPES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stream(tensor: Tensor, dim: int | None, shard: Shard, take: Callable[[Tensor], None]) -> None:
    """Bring a whole tensor to the first process, in the order of its memory and a chunk at a time."""
    group = shard.features
    sizes = [stop - first for first, stop in bounds(shard.d_sae, group.size)]
    everyone = range(group.size)
    if not tensor.ndim:
        tensor, dim = tensor[None], None
    row_bytes = math.prod(_whole_shape(tensor, dim, shard)[1:]) * tensor.dtype.itemsize
    if dim == 0:
        pieces = [(lo, hi, [rank]) for rank in everyone for lo, hi in _stretches(sizes[rank], row_bytes)]
    else:
        senders = [0] if dim is None else list(everyone)
        pieces = [(lo, hi, senders) for lo, hi in _stretches(tensor.shape[0], row_bytes)]
    for lo, hi, senders in pieces:
        parts = []
        for rank in senders:
            shape = [hi - lo, *tensor.shape[1:]]
            if dim:
                shape[dim] = sizes[rank]
            part = tensor[lo:hi] if rank == group.rank else tensor.new_empty(0)
            parts.append(_at_first(part, shape, rank, shard))
        if group.is_first:
            take(torch.cat(parts, dim or 0))


def _at_first(part: Tensor, shape: Sequence[int], sender: int, shard: Shard) -> Tensor:
    """A tensor of one process in the first, on the CPU; others send or leave it, and get nothing of use."""
    group = shard.features
    if sender == 0 or group.rank not in (0, sender) or shard.mesh is None:
        return part.cpu()
    device = shard.mesh.device_type
    if group.rank == sender:
        first = 0 if group.handle is None else dist.get_global_rank(group.handle, 0)
        dist.send(_as_bytes(part).to(device), first, group=group.handle)
        return part
    received = torch.empty(math.prod(shape) * part.dtype.itemsize, dtype=torch.uint8, device=device)
    source = sender if group.handle is None else dist.get_global_rank(group.handle, sender)
    dist.recv(received, source, group=group.handle)
    return received.cpu().view(part.dtype).view(*shape)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
