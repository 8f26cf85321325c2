"""The short way through an SAE against SAELens's own encode and decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.registry import get_sae_class, get_sae_training_class

from saelens_asi.evaluation.reconstruction import sparse_reconstruction
from tests.helpers import tiny

D_SAE, K = 1024, 7  # wide enough for the grouped ranking


def _sae(architecture: str, training: bool, **settings: Any) -> Any:
    sae_class, config_class = (get_sae_training_class if training else get_sae_class)(architecture)
    own = {"k": K} if "topk" in architecture else {}
    sae = sae_class(config_class(d_in=tiny.D_MODEL, d_sae=D_SAE, **own, **settings))
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
    reconstruct = sparse_reconstruction(sae)
    assert reconstruct is not None
    found, firings = reconstruct(x)
    acts = sae.encode(x)
    assert torch.equal(firings, (acts != 0).sum(dim=0))
    assert 0 < firings.sum() <= 200 * K
    torch.testing.assert_close(found, sae.decode(acts), rtol=1e-4, atol=1e-4)
    assert {"x_norm_coeff", "ln_mu", "ln_std"}.isdisjoint(vars(sae))


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("bias", [-60.0, -20.0, 2.0])  # nothing at all on some tokens; few features; most of them
@torch.no_grad()
def test_jumprelu_fires_and_reconstructs_as_saelens(bias: float, normalize: str) -> None:
    sae, x = _sae("jumprelu", False, normalize_activations=normalize), tiny.activations(200)
    x = x * torch.linspace(0, 10, 200)[:, None]  # constant_norm_rescale makes NaN of the first
    sae.b_enc += bias
    sae.threshold.copy_(torch.randn(D_SAE))  # below zero ReLU decides
    reconstruct = sparse_reconstruction(sae)
    assert reconstruct is not None
    found, firings = reconstruct(x)
    acts = sae.encode(x)
    share = float((acts[1:] != 0).double().mean())
    assert {-60.0: share < 0.05, -20.0: 0 < share < 0.2, 2.0: share > 0.3}[bias], share
    assert torch.equal(firings, (acts != 0).sum(dim=0))
    torch.testing.assert_close(found, sae.decode(acts), rtol=1e-4, atol=1e-3, equal_nan=True)


def test_anything_else_takes_saelens_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sparse_reconstruction(_sae("topk", False)) is not None
    assert sparse_reconstruction(tiny.training_sae("standard")) is None
    assert sparse_reconstruction(tiny.training_sae("batchtopk")) is None
    assert sparse_reconstruction(_sae("topk", False).to(torch.bfloat16)) is None
    hooked = _sae("topk", False)
    hooked.hook_sae_acts_post.add_hook(lambda acts, hook: acts * 2)
    assert sparse_reconstruction(hooked) is None
    replaced = _sae("topk", False)
    replaced.encode = replaced.encode
    assert sparse_reconstruction(replaced) is None
    monkeypatch.setattr(get_sae_class("topk")[0], "decode", lambda self, acts: acts)
    assert sparse_reconstruction(_sae("topk", False)) is None
