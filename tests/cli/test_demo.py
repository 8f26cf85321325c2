"""The demo on a model and a dataset given by name: here local folders, elsewhere the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saelens_asi import cli
from tests.helpers import tiny


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text(tmp_path_factory.mktemp("dataset"), 120, 150)


def _demo(model: Path, dataset: Path, out: Path, *flags: str) -> None:
    sizes = "--d-sae 64 --k 4 --training-tokens 4096 --held-out-tokens 512 --context-size 16 --loss-windows 8"
    cli.main(["demo", "--model", str(model), "--dataset", str(dataset), "--out", str(out), *sizes.split(), *flags])


def test_the_demo_runs_on_a_model_and_a_dataset_by_name(
    llama_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _demo(llama_folder, text_folder, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["hook_name"] == "blocks.1.hook_attn_out"  # the middle of two layers
    assert results["results"].keys() == {"stock", "with the flag"}
    printed = capsys.readouterr().out
    assert (tmp_path / "results.md").read_text().strip() in printed
    for name in ("stock", "with_the_flag", "comparison.png", "firing_rates.png", "subspace.png", "results.json"):
        assert (tmp_path / name).exists()
        assert str(tmp_path / name) in printed


def test_a_hook_that_does_not_exist_is_named(llama_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"blocks\.9\.hook_attn_out"):
        _demo(llama_folder, text_folder, tmp_path, "--hook-name", "blocks.9.hook_attn_out")


def test_a_dataset_without_text_is_named(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(ValueError, match="no column 'text'"):
        _demo(llama_folder, tmp_path, tmp_path / "out")
