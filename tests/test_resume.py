"""Files that are whole or not there; tensors in torch's own memory; settings that differ are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saelens_asi.resume import differences, load_tensors, save_tensors, tensor_metadata, write_json, written_whole


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
