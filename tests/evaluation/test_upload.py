"""What SAELens's upload does with README.md, and that cards of ours are taken along; no network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from sae_lens import SAE, upload_saes_to_huggingface

from saelens_asi import cli
from saelens_asi.evaluation.cards import CARD, FIGURE
from saelens_asi.evaluation.upload import upload_saes
from tests.helpers import tiny
from tests.helpers.fake_hub import FakeHub, replace_the_network

REPOSITORY = "someone/saes"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return replace_the_network(monkeypatch)


@pytest.fixture(scope="module")
def carded(tmp_path_factory: pytest.TempPathFactory, model, dataset) -> Path:
    """An SAE of a real run with both flags, and its card."""
    folder = tmp_path_factory.mktemp("carded")
    flags = {"initializer": "active_subspace", "optimizer": "sparse_adam"}
    tiny.run(tiny.runner_config(tiny.sae_config(**flags), folder), model, dataset)
    cli.main(["card", str(folder / "output"), "--license", "mit", "--base-model", "someone/tiny"])
    return folder / "output"


def test_saelens_alone_leaves_a_card_behind_and_writes_a_list(carded: Path, hub: FakeHub) -> None:
    """What the docs say of it; where this fails, SAELens has changed, and cards may go along by themselves."""
    upload_saes_to_huggingface({"layer_1": carded}, REPOSITORY, show_progress=False)
    files = hub.repositories[REPOSITORY]
    saes = {"cfg.json", "sae_weights.safetensors", "runner_cfg.json", "sparsity.safetensors"}
    assert files.keys() == {CARD, *(f"layer_1/{name}" for name in saes)}
    assert b"This repository contains the following SAEs" in files[CARD]


def test_the_card_is_there_before_saelens_looks_and_stays(carded: Path, hub: FakeHub) -> None:
    upload_saes({"layer_1": carded}, REPOSITORY, show_progress=False)
    files = hub.repositories[REPOSITORY]
    assert {CARD, f"layer_1/{CARD}", f"layer_1/{FIGURE}", "layer_1/sae_weights.safetensors"} <= files.keys()
    assert hub.order.index(CARD) < hub.order.index("layer_1/cfg.json")
    assert hub.order.count(CARD) == 1
    card = ModelCard(files[CARD].decode())
    assert card.data.to_dict() == {
        "library_name": "saelens",
        "license": "mit",
        "base_model": "someone/tiny",
        "tags": [
            *("saelens", "sparse-autoencoder", "mechanistic-interpretability", "topk"),
            "active-subspace-initialization",
        ],
    }
    assert f"](layer_1/{FIGURE})" in card.text
    assert f'SAE.from_pretrained("{REPOSITORY}", "layer_1")' in card.text
    assert f"]({FIGURE})" in files[f"layer_1/{CARD}"].decode()
    assert files["layer_1/sae_weights.safetensors"] == (carded / "sae_weights.safetensors").read_bytes()


def test_several_get_a_page_that_leads_to_their_cards(carded: Path, hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(carded, tmp_path / "other")
    (tmp_path / "other" / CARD).unlink()
    cli.main(["card", str(tmp_path / "other"), "--base-model", "someone/else"])
    bare = SAE.load_from_disk(carded)
    upload_saes({"a": carded, "b": tmp_path / "other", "c": bare}, REPOSITORY, show_progress=False)
    files = hub.repositories[REPOSITORY]
    page = ModelCard(files[CARD].decode())
    assert page.data.to_dict()["base_model"] == ["someone/tiny", "someone/else"]
    assert "license" not in page.data.to_dict()  # one of them names none
    assert "- [a](a/README.md)\n- [b](b/README.md)\n- c" in page.text
    assert {"a/README.md", "b/README.md", "c/cfg.json"} <= files.keys()
    assert "c/README.md" not in files


def test_a_readme_of_the_repository_stays(carded: Path, hub: FakeHub) -> None:
    hub.repositories[REPOSITORY] = {CARD: b"mine"}
    upload_saes({"layer_1": carded}, REPOSITORY, show_progress=False)
    assert hub.repositories[REPOSITORY][CARD] == b"mine"
    assert f"layer_1/{CARD}" in hub.repositories[REPOSITORY]


def test_without_cards_it_is_saelens_alone(carded: Path, hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(carded, tmp_path / "bare", ignore=shutil.ignore_patterns(CARD, FIGURE))
    upload_saes({"one": tmp_path / "bare"}, REPOSITORY, show_progress=False)
    ours = hub.repositories.pop(REPOSITORY)
    upload_saes_to_huggingface({"one": tmp_path / "bare"}, REPOSITORY, show_progress=False)
    assert hub.repositories[REPOSITORY] == ours


def test_a_folder_without_an_sae_is_refused_before_anything_is_sent(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("a card")
    with pytest.raises(FileNotFoundError, match=r"cfg\.json"):
        upload_saes({"one": tmp_path}, REPOSITORY, show_progress=False)
    assert hub.repositories == {}
    with pytest.raises(ValueError, match="No SAEs"):
        upload_saes({}, REPOSITORY)
