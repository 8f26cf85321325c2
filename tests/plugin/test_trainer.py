"""Every architecture trains with both flags, and with SAELens's options beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch.optim import Adam

from saelens_asi import ActiveSubspaceInit, SparseAdam, Spectrum
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.spectra.moments import RunningMoments
from tests.helpers import third_party, tiny

D_INIT = 5
SETTINGS = ActiveSubspaceInit(d_init=D_INIT, n_tokens=512)
FLAGS: dict[str, Any] = {"initializer": SETTINGS, "optimizer": "sparse_adam"}
ALL = (*tiny.ARCHITECTURES, third_party.ARCHITECTURE)


def _train(trainer: Any) -> list[Any]:
    """Outputs of all steps."""
    outputs = []
    stock_step = trainer.step

    def step(batch: torch.Tensor) -> Any:
        outputs.append(stock_step(batch))
        return outputs[-1]

    trainer.step = step
    trainer.fit()
    return outputs


@pytest.mark.parametrize("architecture", ALL)
def test_training_with_both_flags_lowers_the_loss(architecture):
    trainer = tiny.trainer(architecture, n_steps=40, lr=3e-3, **FLAGS)
    losses = [output.loss.item() for output in _train(trainer)]
    assert sum(losses[-5:]) / 5 < 0.95 * losses[0]
    assert isinstance(trainer.optimizer, SparseAdam)
    assert all(bool(torch.isfinite(param).all()) for param in trainer.sae.parameters())
    record = trainer.sae.cfg.metadata[METADATA_KEY]
    assert record["d_init"] == D_INIT
    assert record["variance_explained"] > 0.99
    assert record["n_tokens"] == 512


@pytest.mark.parametrize("architecture", ALL)
def test_the_first_loss_is_far_below_that_of_the_stock_start(architecture):
    first = {}
    for name, initializer in (("stock", "default"), ("ours", SETTINGS)):
        trainer = tiny.trainer(architecture, n_steps=1, initializer=initializer)
        first[name] = _train(trainer)[0].losses["mse_loss"].item()
    # Of a batch, the longest tokens take more than the k features that the norm is fitted with.
    assert first["ours"] < (0.4 if "batch" in architecture else 0.2) * first["stock"]


@pytest.mark.parametrize("architecture", ALL)
def test_the_initial_weights_are_tied_of_one_norm_and_inside_the_subspace(architecture):
    trainer = tiny.trainer(architecture, **FLAGS)
    trainer._initialize_if_pending()
    sae = trainer.sae
    x = tiny.activations(8192).double()
    active = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:D_INIT]
    rows = sae.W_dec.detach().double()
    outside = rows - rows @ active.T @ active
    assert outside.norm() < 0.01 * rows.norm()
    assert torch.linalg.matrix_rank(rows, rtol=1e-5) == D_INIT
    torch.testing.assert_close(rows.norm(dim=1), rows.norm(dim=1)[:1].expand(len(rows)))
    assert rows[0].norm().item() == pytest.approx(sae.cfg.metadata[METADATA_KEY]["norm"], rel=1e-5)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.b_dec.detach().double(), x.mean(0), atol=0.3, rtol=0)


def test_the_named_initializer_is_the_default_settings():
    decoders = []
    for initializer in ("active_subspace", ActiveSubspaceInit()):
        trainer = tiny.trainer(initializer=initializer)
        trainer._initialize_if_pending()
        assert trainer.sae.cfg.metadata[METADATA_KEY]["settings"] == ActiveSubspaceInit().to_dict()
        decoders.append(trainer.sae.W_dec.detach().clone())
    assert torch.equal(*decoders)


def test_the_initialization_happens_once_however_often_fit_is_called():
    trainer = tiny.trainer(n_steps=2, **FLAGS)
    trainer.fit()
    weights = trainer.sae.W_dec.detach().clone()
    trainer.fit()
    assert torch.equal(trainer.sae.W_dec, weights)


def test_the_optimizer_holds_the_parameters_that_were_initialised():
    trainer = tiny.trainer("gated", **FLAGS)
    before = {id(param) for param in trainer.sae.parameters()}
    trainer._initialize_if_pending()
    assert {id(param) for param in trainer.sae.parameters()} == before
    held = {id(param) for group in trainer.optimizer.param_groups for param in group["params"]}
    assert held == before


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_the_norm_is_fitted_with_k_features_at_every_token(architecture):
    """Also where the SAE selects over the batch: it then starts as the TopK SAE does."""
    norm = {}
    for name in ("topk", architecture):
        trainer = tiny.trainer(name, d_sae=64, k=4, n_steps=1, initializer=SETTINGS)
        activation_fn = trainer.sae.activation_fn
        _train(trainer)
        assert trainer.sae.activation_fn is activation_fn
        norm[name] = trainer.sae.cfg.metadata[METADATA_KEY]["norm"]
    assert norm[architecture] == pytest.approx(norm["topk"], rel=1e-6)


def test_batchtopk_with_less_than_one_feature_a_token_starts():
    trainer = tiny.trainer("batchtopk", k=0.4, n_steps=1, initializer=SETTINGS)
    _train(trainer)
    assert trainer.sae.cfg.metadata[METADATA_KEY]["norm"] > 0


def test_a_missing_lr_end_takes_its_documented_default():
    trainer = tiny.trainer(lr=4e-3, lr_end=None, optimizer="sparse_adam")
    assert trainer.cfg.lr_end == pytest.approx(4e-4)


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_autocast_trains(architecture):
    trainer = tiny.trainer(architecture, n_steps=30, autocast=True, **FLAGS)
    losses = [output.loss.item() for output in _train(trainer)]
    assert losses[-1] < losses[0]
    assert trainer.sae.W_dec.dtype is torch.float32


@pytest.mark.parametrize("architecture", ["topk", "standard", "batchtopk"])
def test_bfloat16_weights_train_with_float32_moments(architecture):
    provider = (batch.bfloat16() for batch in tiny.batches())
    trainer = tiny.trainer(architecture, provider, n_steps=30, lr=1e-2, dtype="bfloat16", **FLAGS)
    losses = [output.loss.item() for output in _train(trainer)]
    assert losses[-1] < losses[0]
    assert trainer.sae.W_dec.dtype is torch.bfloat16
    assert trainer.optimizer.state[trainer.sae.W_dec]["exp_avg"].dtype is torch.float32
    assert trainer.sae.cfg.metadata[METADATA_KEY]["variance_explained"] > 0.99


def test_a_compiled_sae_trains_as_an_uncompiled_one(model, dataset, tmp_path, monkeypatch):
    # SAELens asks for the inductor backend, which takes most of a minute here; aot_eager captures the same graph.
    compiled_functions = []

    def compile_quickly(function: Any, **_: Any) -> Any:
        compiled_functions.append(function)
        return stock_compile(function, backend="aot_eager")

    stock_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_quickly)
    weights = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        settings = {"compile_sae": compiled, "training_tokens": 4 * tiny.BATCH}
        sae = tiny.run(tiny.runner_config(tiny.sae_config("standard", **FLAGS), tmp_path, **settings), model, dataset)
        assert METADATA_KEY in sae.cfg.metadata
        weights[compiled] = sae.W_dec.detach().clone()
    assert [function.__name__ for function in compiled_functions] == ["training_forward_pass"]
    torch.testing.assert_close(weights[True], weights[False], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("options", [{"prefetch_llm_batches": True}, {"autocast": True, "autocast_lm": True}])
def test_runner_options(options, model, dataset, tmp_path):
    sae = tiny.run(tiny.runner_config(tiny.sae_config(**FLAGS), tmp_path, **options), model, dataset)
    assert sae.cfg.metadata[METADATA_KEY]["n_tokens_taken_from_training"] == 0
    assert SAE.load_from_disk(tmp_path / "output").cfg.metadata[METADATA_KEY]["d_init"] == D_INIT


def _spectrum_file(folder: Any, x: torch.Tensor) -> Any:
    return Spectrum.from_moments(RunningMoments.zeros(x.shape[1]).update_(x)).save(folder / "spectrum.safetensors")


def test_a_spectrum_file_takes_the_place_of_tokens(tmp_path):
    path = _spectrum_file(tmp_path, tiny.activations(4096))
    shifted = (batch + 7 for batch in tiny.batches())  # whose mean is not the file's
    trainer = tiny.trainer(provider=shifted, initializer=ActiveSubspaceInit(d_init=D_INIT, spectrum=path))
    trainer._initialize_if_pending()
    record = trainer.sae.cfg.metadata[METADATA_KEY]
    assert record["n_tokens"] == 4096
    assert record["settings"]["spectrum"] == str(path)
    torch.testing.assert_close(trainer.sae.b_dec.detach(), tiny.activations(4096).mean(0), atol=1e-4, rtol=0)


def test_a_spectrum_file_is_scaled_with_the_activations(tmp_path):
    path = _spectrum_file(tmp_path, tiny.activations(4096))
    settings = ActiveSubspaceInit(d_init=D_INIT, spectrum=path)
    trainer = tiny.trainer(initializer=settings, normalize_activations="expected_average_only_in")
    trainer._initialize_if_pending()
    expected = tiny.activations(4096).mean(0) * trainer.activation_scaler.scaling_factor
    torch.testing.assert_close(trainer.sae.b_dec.detach(), expected, atol=1e-4, rtol=0)


def test_the_estimate_in_the_first_checkpoint_gives_the_same_start_again(model, dataset, tmp_path):
    def start(settings: ActiveSubspaceInit, folder: str, **changes: Any) -> Any:
        checkpoints = {"checkpoint_path": str(tmp_path / folder), "n_checkpoints": 1, **changes}
        cfg = tiny.runner_config(tiny.sae_config(initializer=settings), tmp_path, lr=1e-30, **checkpoints)
        return tiny.run(cfg, model, dataset)

    first = start(SETTINGS, "one")
    (path,) = tmp_path.glob("one/*/*/active_subspace_spectrum.safetensors")
    assert Spectrum.load(path).n_tokens == 512
    again = start(ActiveSubspaceInit(d_init=D_INIT, n_tokens=512, spectrum=path), "two")
    assert list(tmp_path.glob("two/*/*/active_subspace_spectrum.safetensors")) == []
    torch.testing.assert_close(again.W_dec, first.W_dec)
    torch.testing.assert_close(again.b_dec, first.b_dec)


def test_a_stock_optimizer_stays_adam():
    assert type(tiny.trainer(initializer=SETTINGS).optimizer) is Adam
