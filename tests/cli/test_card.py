"""saelens-asi card: a card that the hub's own reader understands, and a README.md that is never lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from sae_lens import SAE

from saelens_asi import cli
from saelens_asi.activations.models import hub_name
from saelens_asi.cli.card import EVALUATION
from saelens_asi.evaluation.cards import CARD, FIGURE, is_own
from tests.helpers import tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text(tmp_path_factory.mktemp("text"), 60, 100)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bridge: Any, dataset: Any, llama_folder: Path) -> Path:
    """An SAE of a real run with both flags."""
    folder = tmp_path_factory.mktemp("trained")
    flags = {"initializer": "active_subspace", "optimizer": "sparse_adam"}
    cfg = tiny.runner_config(tiny.sae_config(**flags), folder, model_name=str(llama_folder))
    cfg.logger.wandb_log_frequency = 2
    tiny.run(cfg, bridge, dataset)
    return folder / "output"


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "sae"))


def card(folder: Path, *flags: str) -> ModelCard:
    cli.main(["card", str(folder), *flags])
    return ModelCard.load(folder / CARD)


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["card", *map(str, args)])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_it_tells_what_the_folder_knows(folder: Path) -> None:
    found = card(folder)
    assert found.data.library_name == "saelens"
    assert found.data.license is None
    assert found.data.base_model is None  # a local folder
    assert {"saelens", "topk", "active-subspace-initialization"} <= set(found.data.tags)
    provenance = SAE.load_from_disk(folder).cfg.metadata["active_subspace_init"]
    for name, value in {
        "directions of the start (d_init)": provenance["d_init"],
        "tokens trained on": 320,
        "optimizer": "sparse_adam",
        "saelens_asi": provenance["saelens_asi_version"],
    }.items():
        assert f"| {name} | {value} |" in found.text
    assert "## Metrics" not in found.text
    assert f"]({FIGURE})" in found.text
    assert (folder / FIGURE).read_bytes().startswith(b"\x89PNG")
    assert (folder / CARD).read_text().startswith("---\n")


def test_the_license_and_the_model_are_the_users(folder: Path) -> None:
    found = card(folder, "--license", "apache-2.0", "--base-model", "someone/model")
    assert (found.data.license, found.data.base_model) == ("apache-2.0", "someone/model")
    assert "[someone/model](https://huggingface.co/someone/model)" in found.text


def test_its_metrics_are_those_of_an_evaluation(folder: Path, text: Path) -> None:
    flags = ("--n-tokens", "300", "--loss-tokens", "96", "--dataset", str(text))
    found = card(folder, "--evaluate", *flags)
    results = json.loads((folder / EVALUATION / "results.json").read_text())["results"]["sae"]
    assert f"| normalized MSE | {results['nmse']:.4g} |" in found.text
    assert f"| KL divergence recovered | {results['loss']['kl_recovered']:.4g} |" in found.text
    assert "On 300 tokens" in found.text
    assert is_own((folder / CARD).read_text())
    # What was measured is found again, and in a folder that was moved too.
    (folder / CARD).unlink()
    assert card(folder).text == found.text
    moved = folder.rename(folder.with_name("moved"))
    (moved / CARD).unlink()
    assert card(moved).text == found.text


def test_results_of_an_evaluation_of_many_are_found(folder: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "saes" / "one")
    shutil.copytree(folder, tmp_path / "saes" / "two")
    cfg = tmp_path / "saes" / "two" / "cfg.json"
    cfg.write_text(cfg.read_text().replace('"k": 4', '"k": 3'))
    out = tmp_path / "out"
    evaluate = ["--n-tokens", "300", "--loss-tokens", "0", "--dataset", str(text), "--out", str(out)]
    cli.main(["evaluate", str(tmp_path / "saes"), *evaluate])
    results = json.loads((out / "results.json").read_text())["results"]
    assert results["one"]["nmse"] != results["two"]["nmse"]
    for name in ("one", "two"):
        found = card(tmp_path / "saes" / name, "--results", str(out))
        assert f"| normalized MSE | {results[name]['nmse']:.4g} |" in found.text
        assert "recovered" not in found.text


def test_numbers_of_another_sae_are_not_told(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    card(folder, "--evaluate", "--n-tokens", "300", "--loss-tokens", "0", "--dataset", str(text))
    sae = SAE.load_from_disk(folder)
    sae.W_dec.data *= 2
    sae.save_model(folder)
    capsys.readouterr()
    found = card(folder)
    assert "## Metrics" not in found.text
    assert "was measured on another SAE" in caplog.text
    assert "holds no evaluation of" in fails(capsys, folder, "--results", folder / EVALUATION)


def test_a_readme_that_is_not_ours_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / CARD).write_text("what I wrote")
    error = fails(capsys, folder, "--evaluate", "--dataset", "no/where")  # said before anything is measured
    assert "was not written by saelens-asi card" in error
    assert "--force writes over it" in error
    assert (folder / CARD).read_text() == "what I wrote"
    assert not (folder / FIGURE).exists()
    card(folder, "--force")
    card(folder, "--license", "mit")  # its own is written over
    text = (folder / CARD).read_text()
    assert "license: mit" in text
    (folder / CARD).write_text(text + "A sentence of mine.\n")
    assert "was changed since" in fails(capsys, folder)
    assert (folder / CARD).read_text().endswith("A sentence of mine.\n")


def test_an_sae_of_another_make_has_a_card_too(tmp_path: Path) -> None:
    """No flags, no history, no text: what is not known is left out."""
    sae = tiny.training_sae("jumprelu")
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = "blocks.1.hook_attn_out", "gpt2-small"
    sae.save_inference_model(tmp_path)
    found = card(tmp_path)
    assert found.data.base_model in ("gpt2", "openai-community/gpt2")
    assert "active-subspace-initialization" not in found.data.tags
    assert FIGURE not in found.text
    assert not (tmp_path / FIGURE).exists()
    assert "None" not in found.text
    assert "2508.16929" not in found.text


def test_bad_input_ends_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no folder" in fails(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no SAE" in fails(capsys, tmp_path / "empty")
    shutil.copytree(folder, tmp_path / "many" / "one")
    assert "is not the folder of one SAE: below it are one" in fails(capsys, tmp_path / "many")
    (folder / "training_history.jsonl").write_text("{\n{\n")
    assert "line 1 of" in fails(capsys, folder)
    (folder / "cfg.json").write_text("{")
    assert "cfg.json cannot be read" in fails(capsys, folder)
    assert not (folder / CARD).exists()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("gemma3-270m", "google/gemma-3-270m"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("owner/model", "owner/model"),
        ("/a/folder", None),
        ("./folder/below", None),
        ("something", None),
        (None, None),
    ],
)
def test_the_name_on_the_hub(name: str | None, known: str | None) -> None:
    assert hub_name(name) == known
