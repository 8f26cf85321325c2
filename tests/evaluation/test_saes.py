"""SAEs in folders: a damaged one is refused by its path."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from saelens_asi.evaluation.saes import SAESource, check_sae
from tests.helpers import tiny
from tests.helpers.damage import Damage, Hostile, damages

FILES = {
    "standard": ["cfg.json", "sae_weights.safetensors"],
    "checkpoint": ["cfg.json", "sae_weights.safetensors", "activation_scaler.json"],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE for inference, and a checkpoint of a training SAE with the scale of its activations."""
    folder = tmp_path_factory.mktemp("saes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny.training_sae("standard").save_inference_model(folder / "standard")
        tiny.training_sae("batchtopk", normalize_activations="expected_average_only_in").save_model(
            folder / "checkpoint"
        )
    (folder / "checkpoint" / "trainer_state.pt").write_bytes(pickle.dumps(Hostile(folder / "marker")))
    (folder / "checkpoint" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.5}))
    return folder


@settings(deadline=None, max_examples=300)
@given(damage=damages(), kind=st.sampled_from(["standard", "checkpoint"]), missing=st.booleans())
def test_a_damaged_sae_is_refused_by_its_path_or_loads_finite_weights(
    damage: Damage, kind: str, missing: bool, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / kind
    shutil.copytree(saved / kind, folder)
    file = folder / damage.choose(FILES[kind])
    damage.apply(file)
    if missing and file.is_file():
        file.unlink()
    sae = whole = SAESource("a", saved / kind).load()
    refusal = str(folder)
    try:
        sae = SAESource("a", folder).load()
    except ValueError as error:
        refusal = str(error)
    assert str(folder) in refusal
    assert {name: one.shape for name, one in sae.state_dict().items()} == {
        name: one.shape for name, one in whole.state_dict().items()
    }
    assert all(one.isfinite().all() for one in sae.state_dict().values())
    assert not (saved / "marker").exists()


def test_a_whole_sae_is_loaded_as_it_was_saved(saved: Path) -> None:
    weights = load_file(saved / "standard" / "sae_weights.safetensors")
    sae = SAESource("a", saved / "standard").load()
    assert all(torch.equal(one, weights[name]) for name, one in sae.state_dict().items())


def test_an_infinite_threshold_is_a_feature_that_never_fires(tmp_path: Path) -> None:
    sae = tiny.training_sae("jumprelu")
    sae.save_inference_model(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["threshold"][:5] = torch.inf
    save_file(tensors, path)
    assert (SAESource("a", tmp_path).load().encode(tiny.activations(50))[:, :5] == 0).all()
    tensors["threshold"][0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match="1 of threshold"):
        SAESource("a", tmp_path).load()


def test_a_whitening_that_is_lost_is_not_left_out_of_the_weights(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "checkpoint", tmp_path / "sae")
    path = tmp_path / "sae" / "activation_scaler.json"
    path.write_text(json.dumps({"scaling_factor": None, "has_whitening": True}))
    with pytest.raises(ValueError, match=f"{path} tells of a whitening"):
        SAESource("a", tmp_path / "sae").load()


def test_more_features_a_token_than_there_are_is_refused() -> None:
    sae = tiny.training_sae("topk")
    d_sae = sae.cfg.d_sae
    sae.cfg.k = d_sae + 1
    with pytest.raises(ValueError, match=f"'a' has k={d_sae + 1}, which must be from 1 to its d_sae={d_sae}"):
        check_sae(sae, "a")
