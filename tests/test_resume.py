"""Files that are whole or not there; tensors in torch's own memory; settings that differ are named."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_asi.resume import (
    MANIFEST,
    WRITER,
    damage,
    differences,
    failing_together,
    folder_written_whole,
    load_tensors,
    one_writer,
    read_manifest,
    save_tensors,
    tensor_metadata,
    write_json,
    written_whole,
)
from saelens_asi.sparse.shards import Processes
from tests.helpers.processes import in_processes


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(OSError, match="full"):
        _fill_the_disk(path)
    assert path.read_text() == '{"step": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def _fill_the_disk(path: Path) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text("half of")
        raise OSError("disk full")


def test_what_is_not_strict_json_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, [1])
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, [float("nan")])
    assert path.read_text() == "[1]\n"


@pytest.mark.parametrize("odd", [1, 3, 5])
def test_tensors_come_back_equal_and_aligned_as_torch_aligns(tmp_path: Path, odd: int) -> None:
    tensors = {"odd": torch.arange(odd, dtype=torch.int8), "scatter": torch.randn(7, 7, dtype=torch.float64)}
    save_tensors(tmp_path / "file.safetensors", tensors, {"format": "test"})
    found = load_tensors(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
    assert tensor_metadata(tmp_path / "file.safetensors") == {"format": "test"}


def test_settings_that_differ_are_named_with_both_values() -> None:
    assert differences({"k": 1, "hooks": ["a"]}, {"k": 1, "hooks": ("a",)}) == ""
    assert differences({"k": 1, "old": 2}, {"k": 3}) == "k was 1 and is 3; old was 2 and is None"


def _write(folder: Path, text: str = "new") -> None:
    with folder_written_whole(folder, {"step": 3}) as unfinished:
        (unfinished / "file").write_text(text)
        (unfinished / "inner").mkdir()
        (unfinished / "inner" / "file").write_bytes(bytes(range(256)))


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    _write(tmp_path / "one")
    assert damage(tmp_path / "one") is None
    assert read_manifest(tmp_path / "one")["step"] == 3
    assert sorted(read_manifest(tmp_path / "one")["files"]) == ["file", "inner/file"]
    with pytest.raises(IsADirectoryError), folder_written_whole(tmp_path / "two", {}) as unfinished:
        unfinished.write_text("half")
    _write(tmp_path / "one", "newer")
    assert (tmp_path / "one" / "file").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_an_error_leaves_the_folder_that_was_there(tmp_path: Path) -> None:
    _write(tmp_path / "one")
    with pytest.raises(OSError, match="full"), folder_written_whole(tmp_path / "one", {}):
        raise OSError("full")
    assert damage(tmp_path / "one") is None


def _write_together(folder: Path, failing: tuple[int, str] | None = None) -> tuple[str, list[str], bool]:
    """What each process raises, which folders it then sees, and whether they all were given one name."""
    world = Processes.spread(1, "cpu").world
    error, names = "", []
    try:
        with folder_written_whole(folder, {"by": world.rank}, world) as unfinished:
            names = world.gather_objects(unfinished)
            (unfinished / f"__{world.rank}_0.distcp").write_text(f"of {world.rank}")
            (unfinished / f"__{world.rank + 7}_0.distcp").write_text("of nobody here")
            (unfinished / "inner").mkdir(exist_ok=True)
            (unfinished / "inner" / f"name of {world.rank}").write_text("")
            if failing is not None and world.rank == failing[0]:
                raise ValueError(failing[1])
    except (ValueError, OSError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return error, sorted(path.name for path in folder.parent.iterdir()), len(set(names)) == 1


def test_processes_write_one_folder(tmp_path: Path) -> None:
    _write(tmp_path / "one", "older")
    assert in_processes(3, _write_together, tmp_path / "one") == [("", ["one"], True)] * 3
    assert damage(tmp_path / "one") is None
    own = [f"__{rank}_0.distcp" for rank in (0, 1, 2, 7, 8, 9)]
    assert list(read_manifest(tmp_path / "one")["files"]) == [*own, *(f"inner/name of {rank}" for rank in range(3))]
    assert read_manifest(tmp_path / "one")["by"] == 0


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_of_one_process_is_one_of_all_and_leaves_nothing(tmp_path: Path, failing: int) -> None:
    _write(tmp_path / "one")
    told = in_processes(3, _write_together, tmp_path / "one", (failing, "half"))
    for rank, (error, left, _) in enumerate(told):
        elsewhere = f"ElsewhereError: process {failing} of 3 failed: ValueError: half"
        assert error == ("ValueError: half" if rank == failing else elsewhere)
        assert left == ["one"]
    assert damage(tmp_path / "one") is None
    assert list(read_manifest(tmp_path / "one")["files"]) == ["file", "inner/file"]


def test_a_folder_that_cannot_be_made_is_said_by_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = in_processes(2, _write_below_a_file, tmp_path / "file" / "one")
    assert first.startswith(("NotADirectoryError", "FileExistsError"))
    assert second.startswith("ElsewhereError: process 0 of 2 failed: ")


def _write_below_a_file(folder: Path) -> str:
    try:
        with folder_written_whole(folder, {}, Processes.spread(1, "cpu").world):
            pass
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _fail_together(failing: list[int], folder: Path) -> tuple[str, int]:
    world = Processes.spread(1, "cpu").world
    try:
        with failing_together(world, lambda: (folder / str(world.rank)).touch()):
            if world.rank in failing:
                raise KeyboardInterrupt(world.rank)
    except BaseException as error:
        return f"{type(error).__name__}: {error}", len(list(folder.iterdir()))
    return "", len(list(folder.iterdir()))


def test_what_is_undone_is_so_in_all_when_the_error_comes_out(tmp_path: Path) -> None:
    told = in_processes(3, _fail_together, [1, 2], tmp_path)
    elsewhere = "ElsewhereError: process 1 of 3 failed: KeyboardInterrupt: 1"
    assert told == [(elsewhere, 3), ("KeyboardInterrupt: 1", 3), ("KeyboardInterrupt: 2", 3)]


def test_without_an_error_nothing_is_undone(tmp_path: Path) -> None:
    assert in_processes(2, _fail_together, [], tmp_path) == [("", 0)] * 2


@given(
    name=st.sampled_from(["file", "inner/file", MANIFEST]), place=st.floats(0, 1, exclude_max=True), cut=st.booleans()
)
@settings(max_examples=100, deadline=None)
def test_damage_is_found_and_never_raised(name: str, place: float, cut: bool, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "one"
    _write(folder)
    data = bytearray((folder / name).read_bytes())
    at = int(place * len(data))
    if cut:
        data = data[:at]
    else:
        data[at] ^= 1 << (at % 8)
    (folder / name).write_bytes(bytes(data))
    found = damage(folder)
    assert found is None or isinstance(found, str)
    if name != MANIFEST or cut:
        # The last byte of a manifest is a line break, which JSON does without.
        assert found is not None or (name == MANIFEST and at == len(data))


def test_one_writer_holds_a_folder_until_it_ends(tmp_path: Path) -> None:
    code = "import sys, time; from saelens_asi.resume import one_writer\n"
    code += "with one_writer(sys.argv[1], 'out'): time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as other:
        while not (tmp_path / WRITER).exists():
            time.sleep(0.05)
        with (
            pytest.raises(ValueError, match=rf"out='.*' is being written by process {other.pid} on "),
            one_writer(tmp_path, "out"),
        ):
            pass
        other.kill()
    with one_writer(tmp_path, "out"):
        pass
