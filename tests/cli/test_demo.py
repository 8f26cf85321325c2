"""The demo on a model and a dataset given by name: here local folders, elsewhere the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE

from saelens_asi import cli, evaluate
from saelens_asi.activations.loading import load_documents
from tests.helpers import tiny


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text(tmp_path_factory.mktemp("dataset"), 120, 150)


def _demo(model: Path, dataset: Path, out: Path, *flags: str) -> None:
    sizes = "--d-sae 64 --k 4 --training-tokens 4096 --held-out-tokens 512 --context-size 16 --loss-tokens 128"
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
    for folder in ("stock", "with_the_flag"):
        cfg = json.loads((tmp_path / folder / "runner_cfg.json").read_text())
        assert cfg["use_cached_activations"]
        assert cfg["cached_activations_path"] == str(tmp_path / "activations")
    ends = printed[printed.index("Figure: ") :]
    order = [
        ends.index(part) for part in (str(tmp_path / "firing_rates.png"), "| run |", str(tmp_path / "results.json"))
    ]
    assert order == sorted(order)


def test_another_demo_starts_from_the_same_activations_to_the_same_results(
    llama_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = tmp_path / ".activations.1.tmp"
    killed.mkdir()
    _demo(llama_folder, text_folder, tmp_path)
    first = json.loads((tmp_path / "results.json").read_text())["results"]
    assert "computed in" in capsys.readouterr().out
    assert not killed.exists()
    _demo(llama_folder, text_folder, tmp_path)
    second = json.loads((tmp_path / "results.json").read_text())["results"]
    assert f"{tmp_path / 'activations'}: found" in capsys.readouterr().out
    for name, row in first.items():
        assert {**second[name], "seconds_per_1k_tokens": 0} == {**row, "seconds_per_1k_tokens": 0}


def test_its_numbers_are_those_of_the_function(
    llama_folder: Path, bridge: Any, text_folder: Path, tmp_path: Path
) -> None:
    """Dead features on held-out tokens, error, L0, and the share of cross-entropy and divergence recovered."""
    _demo(llama_folder, text_folder, tmp_path)
    _, held_out = load_documents(str(text_folder), 4096, columns=("text",))
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    for name, folder in (("stock", "stock"), ("with the flag", "with_the_flag")):
        sae = SAE.load_from_disk(tmp_path / folder)
        how = {"n_tokens": 512, "loss_tokens": 128, "context_size": 16, "progress": False}
        expected = evaluate(sae, bridge, held_out, **how)
        assert expected.n_tokens == 512
        assert results[name]["dead_percent"] == pytest.approx(100 * expected.dead_fraction)
        assert results[name]["nmse"] == pytest.approx(expected.nmse, rel=1e-6)
        assert results[name]["l0"] == pytest.approx(expected.l0)
        assert results[name]["ce_recovered_percent"] == pytest.approx(100 * expected.loss.recovered, rel=1e-4)
        assert results[name]["kl_recovered_percent"] == pytest.approx(100 * expected.loss.kl_recovered, rel=1e-4)


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def test_a_hook_that_does_not_exist_is_named(
    llama_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        _demo(llama_folder, text_folder, tmp_path, "--hooks", "blocks.9.hook_attn_out")
    assert exit_info.value.code == 2
    assert "blocks.9.hook_attn_out" in _error(capsys)


def test_a_dataset_without_text_is_named(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(SystemExit) as exit_info:
        _demo(llama_folder, tmp_path, tmp_path / "out")
    assert exit_info.value.code == 2
    assert "no column 'text'" in _error(capsys)
