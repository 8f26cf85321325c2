"""Checkpoints of features spread over processes: equal to the bit for any number of writers and readers."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from saelens_asi import SparseAdam
from saelens_asi import resume as resuming
from saelens_asi.plugin import sharded_checkpoints as sharded
from saelens_asi.plugin.checkpoints import Keeper, KeepSettings
from saelens_asi.plugin.sharded_checkpoints import (
    SHARDS,
    ShardedTensors,
    make_room_,
    read_shards,
    read_stock,
    write_shards,
    write_whole,
)
from saelens_asi.plugin.sparse_steps import feature_row_groups
from saelens_asi.resume import damage, failing_together, folder_written_whole, read_manifest
from saelens_asi.sparse.shards import Processes, Shard
from tests.helpers import tiny
from tests.helpers.processes import in_processes

D_IN, D_SAE = 7, 10  # four processes hold 3, 3, 3 and 1 features
PER_ROW = {"bias_correction": "per_row", "silent_moments": "decay"}
COUNTERS = ("act_freq_scores", "n_forward_passes_since_fired")


def _shard(tokens: int = 1, d_sae: int = D_SAE) -> Shard:
    return Processes.spread(tokens, "cpu").shard(d_sae)


def _training(shard: Shard, dtype: str = "float32", **options: Any) -> tuple[Any, SparseAdam, dict[str, Tensor]]:
    """As a process holds one: W_enc transposed in memory, an optimizer that has not stepped."""
    sae = tiny.training_sae("batchtopk", d_in=D_IN, d_sae=shard.n_features, dtype=dtype)
    sae.W_enc.data = sae.W_enc.data.t().contiguous().t()
    counters = {name: torch.zeros(shard.n_features) for name in COUNTERS}
    return sae, SparseAdam([{**group, **options} for group in feature_row_groups(sae)]), counters


def _stepped(shard: Shard, dtype: str = "float32", **options: Any) -> ShardedTensors:
    """All tensors of a training, the whole ones being the same for any number of processes."""
    sae, optimizer, counters = _training(shard, dtype, **options)
    for param in sae.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    tensors = ShardedTensors.of(sae, optimizer, counters)
    with torch.no_grad():
        for name, tensor in tensors.tensors.items():
            tensor.copy_(_expected(name, tensors, shard))
    return tensors


def _expected(name: str, tensors: ShardedTensors, shard: Shard) -> Tensor:
    """This process's part of a whole tensor of random numbers."""
    tensor, dim = tensors.tensors[name], tensors.dims[name]
    shape = [shard.d_sae if i == dim else size for i, size in enumerate(tensor.shape)]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = (1000 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(tensor.dtype)
    return whole if dim is None else shard.own(whole, dim)


def _unequal(tensors: ShardedTensors, shard: Shard) -> list[str]:
    return [name for name, one in tensors.tensors.items() if not torch.equal(one, _expected(name, tensors, shard))]


def _write(folder: Path, tokens: int = 1, dtype: str = "float32", chunk: int = 64, **options: Any) -> list[str]:
    sharded._CHUNK = chunk
    shard = _shard(tokens)
    tensors = _stepped(shard, dtype, **options)
    write_shards(folder, tensors, shard)
    return _unequal(tensors, shard)


def _pass_on(source: Path, target: Path, tokens: int = 1, dtype: str = "float32", chunk: int = 64) -> Any:
    """Read a checkpoint into a training that has just begun, and write one of that."""
    sharded._CHUNK = chunk
    shard = _shard(tokens)
    sae, optimizer, counters = _training(shard, dtype)
    make_room_(sae, optimizer, source)
    tensors = ShardedTensors.of(sae, optimizer, counters)
    versions = [param._version for param in sae.parameters()]
    left_out = read_shards(source, tensors, shard)
    is_noticed = all(param._version > version for param, version in zip(sae.parameters(), versions, strict=True))
    write_shards(target, tensors, shard)
    return _unequal(tensors, shard), left_out, is_noticed, sorted(tensors.tensors), sae.W_enc.stride()


@pytest.mark.parametrize(("dtype", "chunk"), [("float32", 64), ("bfloat16", 1), ("float32", 1 << 24)])
def test_any_number_of_processes_reads_what_any_other_wrote(tmp_path: Path, dtype: str, chunk: int) -> None:
    assert in_processes(2, _write, tmp_path / "2", 1, dtype, chunk) == [[], []]
    told = in_processes(4, _pass_on, tmp_path / "2", tmp_path / "4", 1, dtype, chunk)
    told.append(_alone(_pass_on, tmp_path / "4", tmp_path / "1", 1, dtype, chunk))
    told += in_processes(2, _pass_on, tmp_path / "1", tmp_path / "2 again", 1, dtype, chunk)
    for unequal, left_out, is_noticed, names, stride in told:
        assert unequal == []
        assert left_out == frozenset()
        assert is_noticed
        assert len(names) == 5 + 4 * 3 + 2
        assert stride == (1, D_IN)


def _alone(function: Any, *args: Any) -> Any:
    stock = sharded._CHUNK
    try:
        return function(*args)
    finally:
        sharded._CHUNK = stock


def _options(source: Path, makes_room: bool, **options: Any) -> tuple[list[str], frozenset[str], set[str]]:
    shard = _shard()
    sae, optimizer, counters = _training(shard, **options)
    if makes_room:
        make_room_(sae, optimizer, source)
        tensors = ShardedTensors.of(sae, optimizer, counters)
    else:
        tensors = _stepped(shard, **options)
    left_out = read_shards(source, tensors, shard)
    return _unequal(tensors, shard), left_out, {name for name in tensors.tensors if name.endswith("_step")}


def test_what_an_option_keeps_is_there_where_it_was_saved(tmp_path: Path) -> None:
    """Rows' own steps are part of the state with some options alone."""
    of_rows = {f"optimizer.{name}.{key}" for name in ("W_enc", "W_dec", "b_enc") for key in ("row_step", "last_step")}
    in_processes(2, _write, tmp_path / "without")
    in_processes(2, _write_per_row, tmp_path / "with")
    assert in_processes(2, _options_per_row, tmp_path / "with", True) == 2 * [([], frozenset(), of_rows)]
    assert in_processes(2, _options_per_row, tmp_path / "without", True) == 2 * [([], frozenset(), set())]
    assert in_processes(2, _options_per_row, tmp_path / "without", False) == 2 * [([], frozenset(of_rows), of_rows)]
    assert in_processes(2, _options, tmp_path / "with", False) == 2 * [([], frozenset(), set())]


def _write_per_row(folder: Path) -> list[str]:
    return _write(folder, **PER_ROW)


def _options_per_row(source: Path, makes_room: bool) -> tuple[list[str], frozenset[str], set[str]]:
    return _options(source, makes_room, **PER_ROW)


def test_every_process_writes_and_nothing_is_written_twice(tmp_path: Path) -> None:
    """Two hold the same features, and share the writing of them."""
    in_processes(4, _write, tmp_path, 2)
    files = {path.name for path in (tmp_path / SHARDS).iterdir()}
    assert files == {".metadata", *(f"__{rank}_0.distcp" for rank in range(4))}
    saved = dcp.FileSystemReader(tmp_path / SHARDS).read_metadata()
    for name, one in saved.state_dict_metadata.items():
        assert sum(chunk.sizes.numel() for chunk in one.chunks) == one.size.numel(), name
        assert max(chunk.sizes.numel() for chunk in one.chunks) * one.properties.dtype.itemsize <= 64
    assert len(saved.state_dict_metadata["sae.b_dec"].chunks) == 1
    assert saved.state_dict_metadata["sae.W_enc"].size == (D_SAE, D_IN)
    told = in_processes(2, _pass_on, tmp_path, tmp_path / "2")
    assert [unequal for unequal, *_ in told] == [[], []]


def _read_misfit(source: Path, d_sae: int, dtype: str, counter: str) -> str:
    shard = _shard(d_sae=d_sae)
    tensors = _stepped(shard, dtype)
    tensors = ShardedTensors(
        {**tensors.tensors, counter: torch.zeros(d_sae)}, {**tensors.dims, counter: None}, tensors.groups
    )
    try:
        read_shards(source, tensors, shard)
    except ValueError as error:
        return str(error)
    return ""


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    in_processes(2, _write, tmp_path)
    for told in in_processes(2, _read_misfit, tmp_path, 12, "bfloat16", "counters.other"):
        assert "counters.other is missing" in told
        assert "sae.W_enc is torch.float32 of shape (10, 7), not torch.bfloat16 of shape (12, 7)" in told
        assert "optimizer.b_enc.exp_avg is torch.float32 of shape (10,), not torch.float32 of shape (12,)" in told


def _read_without_room(source: Path) -> str:
    shard = _shard()
    try:
        read_shards(source, ShardedTensors.of(*_training(shard)), shard)
    except ValueError as error:
        return str(error)
    return ""


def test_moments_are_not_left_unread(tmp_path: Path) -> None:
    in_processes(2, _write, tmp_path)
    assert "no room for optimizer.W_dec.exp_avg, " in _read_without_room(tmp_path)
    tensors = ShardedTensors.of(*_training(Shard.whole(D_SAE)))
    weights = {name: one for name, one in tensors.tensors.items() if name.startswith("sae.")}
    alone = ShardedTensors(weights, tensors.dims)
    read_shards(tmp_path, alone, Shard.whole(D_SAE))
    assert _unequal(alone, Shard.whole(D_SAE)) == []


@pytest.mark.parametrize("what", ["no folder", "metadata", "a shard"])
def test_shards_that_cannot_be_read_are_a_value_error(tmp_path: Path, what: str) -> None:
    in_processes(2, _write, tmp_path)
    if what == "no folder":
        source = tmp_path / "nowhere"
    else:
        source = tmp_path
        path = tmp_path / SHARDS / (".metadata" if what == "metadata" else "__1_0.distcp")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shard = Shard.whole(D_SAE)
    with pytest.raises(ValueError, match=r"cannot be read|no shards that can be read"):
        read_shards(source, _stepped(shard), shard)


def _write_with_failing(folder: Path, failing: int, kind: type[Exception]) -> tuple[str, str]:
    shard = _shard()
    if shard.world.rank == failing:

        def write_data(*args: Any) -> None:
            raise kind("disk full")

        dcp.FileSystemWriter.write_data = write_data  # type: ignore[method-assign]
    try:
        write_shards(folder, _stepped(shard), shard)
    except (OSError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("kind", "raised"), [(OSError, "OSError"), (RuntimeError, "OSError"), (KeyError, "ValueError")]
)
def test_all_processes_say_which_could_not_write(tmp_path: Path, kind: type[Exception], raised: str) -> None:
    for error, told in in_processes(2, _write_with_failing, tmp_path, 1, kind):
        assert error == raised
        assert f"process 1: {kind.__name__}: " in told
        assert "disk full" in told


def _checkpoint(folder: Path) -> tuple[list[str], list[str]]:
    shard = _shard()
    read_again: list[str] = []
    stock = resuming.checksum
    resuming.checksum = lambda path: read_again.append(Path(path).name) or stock(path)
    with folder_written_whole(folder, {"step": 3}, shard.world) as unfinished:
        if shard.world.is_first:
            (unfinished / "cfg.json").write_text("{}")
        with failing_together(shard.world):
            pass
        write_shards(unfinished, _stepped(shard), shard)
    return sorted(read_again), sorted(path.name for path in folder.parent.iterdir())


def test_damage_is_found_in_what_any_process_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "3"
    first, second = in_processes(2, _checkpoint, folder)
    assert first == ([".metadata", "__0_0.distcp", "cfg.json"], ["3"])
    assert second == (["__1_0.distcp"], ["3"])
    files = read_manifest(folder)["files"]
    assert list(files) == ["cfg.json", "shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp"]
    assert damage(folder) is None
    for name in files:
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert damage(folder) == f"the checksum of {name} differs"
        (folder / name).write_bytes(good)


def _read_stock(folder: Path, optimizer_name: str, chunk: int, tokens: int) -> dict[str, tuple[Tensor, int | None]]:
    sharded._CHUNK = chunk
    shard = _shard(tokens, 48)
    sae = tiny.training_sae("batchtopk", d_sae=shard.n_features)
    own = optimizer_name == "sparse_adam"
    optimizer = SparseAdam(feature_row_groups(sae)) if own else torch.optim.Adam(sae.parameters())
    make_room_(sae, optimizer, folder)
    tensors = ShardedTensors.of(sae, optimizer, {name: torch.zeros(shard.n_features) for name in COUNTERS})
    read_stock(folder, tensors, shard)
    optimizer.step()  # without a gradient: the state is one it takes
    return {name: (tensor, tensors.dims[name]) for name, tensor in tensors.tensors.items()}


def _stock_checkpoint(folder: Path, optimizer: str) -> ShardedTensors:
    trainer = tiny.trainer("batchtopk", n_steps=3, optimizer=optimizer)
    trainer.fit()
    trainer.save_checkpoint("one", base_path=folder)
    return ShardedTensors.of(trainer.sae, trainer.optimizer, {name: getattr(trainer, name) for name in COUNTERS})


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
@pytest.mark.parametrize(("n", "tokens", "chunk"), [(2, 1, 100), (4, 2, 1 << 24)])
def test_what_one_process_wrote_is_read_by_many(
    tmp_path: Path, optimizer: str, n: int, tokens: int, chunk: int
) -> None:
    whole = _stock_checkpoint(tmp_path, optimizer)
    told = in_processes(n, _read_stock, tmp_path / "one", optimizer, chunk, tokens)
    for own in told:
        assert own.keys() == whole.tensors.keys()
        assert all(tensor.dtype == whole.tensors[name].dtype for name, (tensor, _) in own.items())
    for name, tensor in whole.tensors.items():
        parts, dim = [own[name][0] for own in told], told[0][name][1]
        assert dim == whole.dims[name]
        per_tokens = n // tokens
        for first in range(0, n, per_tokens):
            of_tokens = parts[first : first + per_tokens]
            found = [torch.cat(of_tokens, dim)] if dim is not None else of_tokens
            assert all(torch.equal(one, tensor) for one in found), name


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    _stock_checkpoint(tmp_path, "adam")
    sae = tiny.training_sae("batchtopk")
    with pytest.raises(ValueError, match=r"groups of \[4\] parameters, not .*resume with the optimizer that wrote it"):
        make_room_(sae, SparseAdam(feature_row_groups(sae)), tmp_path / "one")


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "trainer_state.pt"])
def test_stock_files_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    whole = _stock_checkpoint(tmp_path, "adam")
    (tmp_path / "one" / name).write_bytes(b"half")
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_stock(tmp_path / "one", whole, Shard.whole(48))


DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
SHAPES = {"W_enc": ((D_IN, D_SAE), 1), "W_dec": ((D_SAE, D_IN), 0), "b_enc": ((D_SAE,), 0), "cube": ((2, D_SAE, 3), 1)}
SHAPES |= {"b_dec": ((D_IN,), None), "topk_threshold": ((), None), "mean": ((3, 2), None)}


def _whole_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name} {dtype}": (9 * torch.randn(shape, generator=generator)).to(dtype)
        for name, (shape, _) in SHAPES.items()
        for dtype in DTYPES
    }


def _write_whole(folder: Path, tokens: int, chunk: int, metadata: dict[str, str] | None) -> int:
    sharded._CHUNK = chunk
    shard, whole = _shard(tokens), _whole_tensors()
    dims = {name: SHAPES[name.split()[0]][1] for name in whole}
    own = {name: one if dims[name] is None else shard.own(one, dims[name]) for name, one in whole.items()}
    own = {name: one.t().contiguous().t() if one.ndim == 2 else one for name, one in own.items()}
    path = folder / "weights.safetensors" if shard.world.is_first else Path("/nowhere/weights.safetensors")
    write_whole(path, own, dims, shard, metadata)
    return len(list(folder.iterdir()))


@pytest.mark.parametrize(("n", "tokens", "chunk"), [(1, 1, 50), (2, 1, 1), (3, 1, 1 << 24), (4, 2, 100)])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_one_file_of_all_processes_is_that_of_one(
    tmp_path: Path, n: int, tokens: int, chunk: int, metadata: dict[str, str] | None
) -> None:
    args = (tmp_path, tokens, chunk, metadata)
    told = [_alone(_write_whole, *args)] if n == 1 else in_processes(n, _write_whole, *args)
    assert told == [1] * n
    save_file(_whole_tensors(), tmp_path / "expected.safetensors", metadata=metadata)
    assert (tmp_path / "weights.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), one) for name, one in _whole_tensors().items())


def _write_whole_to_full_disk(folder: Path, written: int) -> str:
    """A disk that is full once the header, or some tensors, are written."""
    sharded._CHUNK = 8

    class Full(sharded._Sink):
        def write(self, tensor: Tensor) -> None:
            left.append(None)
            if len(left) > written and self._file is not None:
                self._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed with the process
            super().write(tensor)

    left: list[None] = []
    sharded._Sink = Full  # type: ignore[misc]
    shard = _shard()
    dims = {"W_dec": 0, "W_enc": 1}
    own = {name: shard.own(torch.zeros(SHAPES[name][0]), dim) for name, dim in dims.items()}
    try:
        write_whole(folder / "weights.safetensors", own, dims, shard)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is full")
@pytest.mark.parametrize("written", [0, 3])
def test_a_full_disk_leaves_nobody_waiting_and_no_file(tmp_path: Path, written: int) -> None:
    first, second, third = in_processes(3, _write_whole_to_full_disk, tmp_path, written)
    assert "No space left" in first
    assert second == third
    assert second.startswith("ElsewhereError: process 0 of 3 failed: OSError")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_said_by_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = in_processes(2, _write_whole_below_a_file, tmp_path / "file")
    assert first.startswith(("FileExistsError", "NotADirectoryError"))
    assert second.startswith("ElsewhereError: process 0 of 2 failed: ")


def _write_whole_below_a_file(file: Path) -> str:
    shard = _shard()
    try:
        write_whole(file / "weights.safetensors", {"b_dec": torch.zeros(3)}, {"b_dec": None}, shard)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_dtype_without_a_name_in_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x is torch.complex128, which is none of I64, "):
        write_whole(tmp_path / "file", {"x": torch.zeros(2, dtype=torch.complex128)}, {"x": None}, Shard.whole(2))


def _keep(folder: Path, error: type[BaseException] | None) -> tuple[str, str, str | None]:
    """A checkpoint of a keeper, in the last process with an error."""
    world = _shard().world
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("saelens_asi.plugin.checkpoints").addHandler(handler)
    logging.getLogger("saelens_asi.plugin.checkpoints").setLevel(logging.INFO)
    keeper = Keeper(KeepSettings(0, 1, 1.0), folder, lambda: {"run": "a"}, world)

    def save(name: str, error: type[BaseException] | None) -> None:
        with keeper.writing(name, "interval") as unfinished:
            (unfinished / f"__{world.rank}_0").write_text(name)
            if error is not None and world.rank == world.size - 1:
                raise error("there")

    for name in ("1", "2"):
        save(name, None)
    raised = ""
    try:
        keeper.save_or_warn(lambda: save("3", error))
    except BaseException as caught:
        raised = type(caught).__name__
    return raised, "\n".join(told), keeper.last_good.name if keeper.last_good else None


def test_the_first_process_keeps_the_checkpoints_of_all(tmp_path: Path) -> None:
    first, second = in_processes(2, _keep, tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    assert damage(tmp_path / "3") is None
    assert first[0] == second[0] == ""
    assert first[2] == second[2] == "3"
    assert first[1].count("wrote checkpoint") == 3
    assert second[1] == ""


def test_a_run_goes_on_in_all_processes_or_in_none(tmp_path: Path) -> None:
    first, second = in_processes(2, _keep, tmp_path, OSError)
    assert first[0] == second[0] == ""
    assert first[2] == second[2] == "2"
    assert "no checkpoint was written (process 1 of 2 failed: OSError: there)" in first[1]
    assert second[1] == ""
    first, second = in_processes(2, _keep, tmp_path, FloatingPointError)
    assert (first[0], second[0]) == ("ElsewhereError", "FloatingPointError")
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
