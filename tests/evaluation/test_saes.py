"""The short way through a TopK SAE against SAELens's own encode and decode."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.registry import get_sae_class, get_sae_training_class
from safetensors.torch import load_file, save_file

from saelens_asi.evaluation.saes import SAESource, check_sae, topk_reconstruction
from tests.helpers import tiny
from tests.helpers.damage import Damage, Hostile, damages

D_SAE, K = 1024, 7  # wide enough for the grouped ranking


def _sae(architecture: str, training: bool, **settings: Any) -> Any:
    sae_class, config_class = (get_sae_training_class if training else get_sae_class)(architecture)
    sae = sae_class(config_class(d_in=tiny.D_MODEL, d_sae=D_SAE, k=K, **settings))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(tiny.D_MODEL, D_SAE))
        sae.W_dec.copy_(torch.randn(D_SAE, tiny.D_MODEL) * torch.rand(D_SAE, 1))
        sae.b_enc.copy_(torch.randn(D_SAE) - 2)
        sae.b_dec.copy_(torch.randn(tiny.D_MODEL))
    return sae


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
@torch.no_grad()
def test_it_fires_and_reconstructs_as_saelens(architecture: str, training: bool, rescale: bool, normalize: str) -> None:
    settings = {"rescale_acts_by_decoder_norm": rescale, "normalize_activations": normalize}
    sae, x = _sae(architecture, training, **settings), tiny.activations(200)
    sae.b_enc -= 100.0 * (architecture == "topk") * (torch.arange(D_SAE) > 5)  # fewer than k can fire
    reconstruct = topk_reconstruction(sae)
    assert reconstruct is not None
    found, firings = reconstruct(x)
    acts = sae.encode(x)
    assert torch.equal(firings, (acts != 0).sum(dim=0))
    assert 0 < firings.sum() <= 200 * K
    torch.testing.assert_close(found, sae.decode(acts), rtol=1e-4, atol=1e-4)
    assert {"x_norm_coeff", "ln_mu", "ln_std"}.isdisjoint(vars(sae))


def test_anything_else_takes_saelens_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert topk_reconstruction(_sae("topk", False)) is not None
    assert topk_reconstruction(tiny.training_sae("standard")) is None
    assert topk_reconstruction(tiny.training_sae("batchtopk")) is None
    assert topk_reconstruction(_sae("topk", False).to(torch.bfloat16)) is None
    hooked = _sae("topk", False)
    hooked.hook_sae_acts_post.add_hook(lambda acts, hook: acts * 2)
    assert topk_reconstruction(hooked) is None
    replaced = _sae("topk", False)
    replaced.encode = replaced.encode
    assert topk_reconstruction(replaced) is None
    monkeypatch.setattr(get_sae_class("topk")[0], "decode", lambda self, acts: acts)
    assert topk_reconstruction(_sae("topk", False)) is None


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
    sae = _sae("topk", False)
    sae.cfg.k = D_SAE + 1
    with pytest.raises(ValueError, match=f"'a' has k={D_SAE + 1}, which must be from 1 to its d_sae={D_SAE}"):
        check_sae(sae, "a")
