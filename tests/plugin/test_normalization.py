"""The initialization works in the space that the encoder sees, for every normalization of SAELens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from saelens_asi import ActiveSubspaceInit
from saelens_asi.initialization import METADATA_KEY
from tests.helpers import tiny

D_INIT = 5
N_NORM, N_TOKENS = 8, 1024
SETTINGS = ActiveSubspaceInit(d_init=D_INIT, n_tokens=N_TOKENS)
MODES = ("none", "expected_average_only_in", "layer_norm", "covariance_whitening")


def _initialised(mode: str, **changes: Any) -> tuple[Any, Tensor]:
    """A trainer before its first step, and the raw activations that its estimate was made from."""
    settings = {"initializer": SETTINGS, "n_batches_for_norm_estimate": N_NORM, **changes}
    trainer = tiny.trainer("standard", normalize_activations=mode, **settings)
    trainer._initialize_if_pending()
    n_before = N_NORM if mode in ("expected_average_only_in", "covariance_whitening") else 0
    stream = tiny.batches()
    used = torch.cat([next(stream) for _ in range(n_before + N_TOKENS // tiny.BATCH)])
    return trainer, used[n_before * tiny.BATCH :]


@torch.no_grad()
def _seen_by_encoder(trainer: Any, x: Tensor) -> Tensor:
    """In float64, what ``encode`` multiplies with W_enc, before b_dec is subtracted."""
    return trainer.sae.run_time_activation_norm_fn_in(trainer.activation_scaler(x)).double()


@pytest.mark.parametrize("mode", ["none", "expected_average_only_in", "layer_norm"])
def test_decoder_rows_lie_in_the_top_directions_of_what_the_encoder_sees(mode):
    trainer, x = _initialised(mode)
    seen = _seen_by_encoder(trainer, x)
    active = torch.linalg.svd(seen - seen.mean(0), full_matrices=False)[2][:D_INIT]
    rows = trainer.sae.W_dec.detach().double()
    assert (rows - rows @ active.T @ active).norm() < 1e-5 * rows.norm()
    torch.testing.assert_close(trainer.sae.b_dec.detach().double(), seen.mean(0), atol=1e-5, rtol=1e-5)


def test_layer_norm_has_other_directions_than_the_raw_activations():
    trainer, x = _initialised("layer_norm")
    active = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)[2][:D_INIT]
    rows = trainer.sae.W_dec.detach().double()
    assert (rows - rows @ active.T @ active).norm() > 1e-2 * rows.norm()


def test_whitened_decoder_rows_use_the_last_coordinates_only():
    trainer, _ = _initialised("covariance_whitening")
    rows = trainer.sae.W_dec.detach()
    assert torch.count_nonzero(rows[:, :-D_INIT].abs() > 1e-6 * rows.abs().max()) == 0
    assert bool((rows[:, -D_INIT:].abs().amax(dim=0) > 0).all())


def test_whitened_decoder_rows_are_the_raw_top_directions():
    trainer, _ = _initialised("covariance_whitening")
    stream = tiny.batches()
    x = torch.cat([next(stream) for _ in range(N_NORM)]).double()  # what the whitening was estimated from
    active = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:D_INIT]
    raw = trainer.sae.W_dec.detach().double() @ trainer.activation_scaler.whitening.inverse_matrix
    assert (raw - raw @ active.T @ active).norm() < 1e-5 * raw.norm()


def test_whitening_reports_the_raw_variance():
    explained = {mode: _initialised(mode)[0].sae.cfg.metadata[METADATA_KEY] for mode in ("none", MODES[-1])}
    raw, whitened = (record["variance_explained"] for record in explained.values())
    assert whitened == pytest.approx(raw, rel=0.02)
    assert raw > 0.99


@pytest.mark.parametrize("mode", MODES)
def test_the_recorded_error_is_that_of_the_untrained_sae(mode):
    trainer, x = _initialised(mode)
    with torch.no_grad():
        scaled = trainer.activation_scaler(x)
        error = (trainer.sae(scaled) - scaled).square().sum()
        expected = error / (scaled - scaled.mean(0)).square().sum()
    recorded = trainer.sae.cfg.metadata[METADATA_KEY]["initial_nmse"]
    assert recorded == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_the_record_names_the_space(mode):
    trainer, _ = _initialised(mode)
    assert trainer.sae.cfg.metadata[METADATA_KEY]["space"] == mode


@pytest.mark.parametrize("mode", ["layer_norm", "covariance_whitening"])
def test_no_statistic_of_the_estimate_is_left_on_the_sae(mode):
    trainer, _ = _initialised(mode)
    assert not {"ln_mu", "ln_std", "x_norm_coeff"} & vars(trainer.sae).keys()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["standard", "topk", "gated", "jumprelu"])
def test_a_trained_sae_reconstructs_raw_activations(mode, architecture, tmp_path):
    window = {"dead_feature_window": 1000}
    flags = {"initializer": SETTINGS, "optimizer": "sparse_adam"}
    trainer = tiny.trainer(architecture, n_steps=60, lr=3e-3, normalize_activations=mode, **window, **flags)
    trainer.fit().save_inference_model(tmp_path)
    x = tiny.activations(2048, seed=10_000)
    loaded = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        error = (loaded(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.35
    assert loaded.cfg.metadata[METADATA_KEY]["space"] == mode


def test_a_zero_centre_is_kept_where_asked_for():
    zeros = ActiveSubspaceInit(d_init=D_INIT, n_tokens=N_TOKENS, center="zeros")
    trainer, _ = _initialised("none", initializer=zeros)
    assert torch.count_nonzero(trainer.sae.b_dec) == 0


@pytest.mark.parametrize("architecture", ["standard", "topk", "gated", "jumprelu", "batchtopk"])
def test_without_b_dec_on_the_input_the_encoder_bias_centres_it(architecture):
    """Where SAELens does not subtract b_dec, the first output must be the same as where it does."""
    outputs = []
    for subtract in (True, False):
        settings = {"initializer": SETTINGS, "apply_b_dec_to_input": subtract}
        trainer = tiny.trainer(architecture, **settings)
        trainer._initialize_if_pending()
        with torch.no_grad():
            outputs.append(trainer.sae(tiny.activations(64)))
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-3, rtol=1e-3)
