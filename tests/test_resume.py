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
    folder_written_whole,
    load_tensors,
    one_writer,
    read_manifest,
    save_tensors,
    tensor_metadata,
    write_json,
    written_whole,
)


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
