"""A wrong setting is an error that names setting, value and way out, before any training step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LoggingConfig, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.training.sae_trainer import SAETrainer

from saelens_asi import ActiveSubspaceInit, Spectrum
from saelens_asi.spectra.moments import RunningMoments
from tests.helpers import tiny

SETTINGS = ActiveSubspaceInit(d_init=4, n_tokens=256)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calling must raise ValueError with all the given words, before a first training step."""

    def no_step(self: SAETrainer, batch: torch.Tensor) -> None:
        pytest.fail("training started")

    monkeypatch.setattr(SAETrainer, "step", no_step)

    def check(call: Callable[[], Any], *words: str) -> None:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call()
        message = str(caught.value)
        assert all(word in message for word in words), message

    return check


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_init": 0}, ["d_init=0", "at least 1"]),
        ({"d_init": -3}, ["d_init=-3", "at least 1"]),
        ({"d_init": 0.0}, ["d_init=0.0", "(0, 1]"]),
        ({"d_init": 1.5}, ["d_init=1.5", "(0, 1]", "int"]),
        ({"d_init": "big"}, ["d_init='big'", "auto"]),
        ({"d_init": 20, "n_tokens": 20}, ["n_tokens=20", "d_init=20", "at least 21"]),
        ({"n_tokens": 1}, ["n_tokens=1", "at least 2"]),
        ({"norm": -1}, ["norm=-1", "positive", "least_squares"]),
        ({"norm": "big"}, ["norm='big'", "least_squares"]),
        ({"center": "median"}, ["center='median'", "mean", "zeros"]),
        ({"subspace": "pca"}, ["subspace='pca'", "active"]),
        ({"seed": 0.5}, ["seed=0.5", "integer"]),
        ({"dinit": 4}, ["dinit", "d_init"]),
    ],
)
def test_settings_in_a_config(settings, words, refused):
    refused(lambda: tiny.sae_config(initializer=settings), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"initializer": "asi"}, ["initializer='asi'", "active_subspace", "ActiveSubspaceInit"]),
        ({"initializer": 3}, ["initializer=3", "active_subspace"]),
        ({"initializer": None}, ["initializer=None", "default"]),
        ({"optimizer": "sgd"}, ["optimizer='sgd'", "adam", "sparse_adam"]),
        ({"optimizer": None}, ["optimizer=None", "adam"]),
        ({"silent_moments": True}, ["silent_moments=True", "keep", "decay"]),
        ({"initializer": ActiveSubspaceInit(d_init=17)}, ["d_init=17", "d_in=16", "at most 16"]),
        ({"initializer": ActiveSubspaceInit(d_init=0.01)}, ["d_init=0.01", "d_in=16", "larger fraction"]),
    ],
)
@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_flags_of_a_config(architecture, flags, words, refused):
    refused(lambda: tiny.sae_config(architecture, **flags), *words)


@pytest.mark.parametrize("value", [[1], {"d_init": 4}])
def test_an_optimizer_that_is_not_a_name(value, refused):
    refused(lambda: tiny.sae_config(optimizer=value), f"optimizer={value!r}", "sparse_adam")


@pytest.mark.parametrize("optimizer", [{}, {"initializer": SETTINGS}])
def test_moments_of_an_optimizer_that_has_no_silence(optimizer, refused):
    words = ("silent_moments='keep'", "optimizer='adam'", "set optimizer='sparse_adam'", "silent_moments='decay'")
    refused(lambda: tiny.trainer(silent_moments="keep", **optimizer), *words)


def _provider(x: torch.Tensor) -> Any:
    return iter(x.split(tiny.BATCH))


def test_d_init_above_the_rank_of_the_sample(refused):
    flat = torch.randn(1024, 3) @ torch.randn(3, tiny.D_MODEL)
    trainer = tiny.trainer(provider=_provider(flat), initializer=SETTINGS)
    refused(trainer.fit, "d_init=4", "rank 3", "256 centred activations", "lower d_init")


def test_data_that_ends_before_d_init_tokens(refused):
    trainer = tiny.trainer(
        provider=_provider(torch.randn(8, tiny.D_MODEL)), initializer=ActiveSubspaceInit(d_init=12, n_tokens=256)
    )
    refused(trainer.fit, "d_init=12", "8 centred activations", "n_tokens")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 100, 255])
def test_activations_that_are_not_finite(bad, position, refused):
    x = tiny.activations(1024)
    x[position, 3] = bad
    trainer = tiny.trainer(provider=_provider(x), initializer=SETTINGS)
    refused(trainer.fit, "NaN or infinity", "dtype")


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_constant_activations(value, refused):
    trainer = tiny.trainer(provider=_provider(torch.full((1024, tiny.D_MODEL), value)), initializer=SETTINGS)
    refused(trainer.fit, "constant", "hook_name")


def test_activations_of_another_width(refused):
    trainer = tiny.trainer(provider=_provider(torch.randn(1024, 12)), initializer=SETTINGS)
    refused(trainer.fit, "12", "16")


@pytest.mark.parametrize(
    ("hook_name", "near"),
    [
        ("blocks.1.hook_atn_out", "blocks.1.hook_attn_out"),
        ("blocks.1.hook_z", "blocks.1.attn.hook_z"),
        ("blocks.1.hook_out", "blocks.1.hook_mlp_out"),
    ],
)
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("prefetch", [False, True])
def test_a_hook_that_does_not_exist(hook_name, near, normalize, prefetch, model, dataset, tmp_path, refused):
    sae = tiny.sae_config(initializer=SETTINGS, normalize_activations=normalize)
    cfg = tiny.runner_config(sae, tmp_path, hook_name=hook_name, prefetch_llm_batches=prefetch)
    refused(lambda: tiny.run(cfg, model, dataset), f"hook_name='{hook_name}'", "did you mean", near)


@pytest.mark.parametrize(
    ("hook_name", "width", "shape"), [("blocks.1.attn.hook_z", 12, "(3, 4)"), (tiny.ATTN_OUT, 16, "(16,)")]
)
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "covariance_whitening"])
def test_d_in_of_another_width(hook_name, width, shape, normalize, model, dataset, tmp_path, refused):
    sae = tiny.sae_config(d_in=24, initializer=SETTINGS, normalize_activations=normalize)
    cfg = tiny.runner_config(sae, tmp_path, hook_name=hook_name)
    words = (f"hook_name={hook_name!r}", f"width {width}", shape, "d_in=24", f"set d_in={width}")
    refused(lambda: tiny.run(cfg, model, dataset), *words)


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_a_multi_runner_names_the_hook_that_is_wrong(normalize, model, dataset, refused):
    def run(hook_name: str, d_in: int) -> None:
        flags = {"initializer": SETTINGS, "normalize_activations": normalize}
        cfg = MultiSAETrainingRunnerConfig(
            saes={"a": tiny.sae_config(**flags), "b": tiny.sae_config(d_in=d_in, **flags)},
            hook_names={"a": tiny.ATTN_OUT, "b": hook_name},
            context_size=tiny.CONTEXT,
            train_batch_size_tokens=tiny.BATCH,
            training_tokens=4 * tiny.BATCH,
            streaming=False,
            checkpoint_path=None,
            output_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )
        MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()

    refused(lambda: run("blocks.1.hook_mpl_out", 16), "hook_name='blocks.1.hook_mpl_out'", "blocks.1.hook_mlp_out")
    refused(lambda: run("blocks.0.hook_mlp_out", 24), "hook_name='blocks.0.hook_mlp_out'", "d_in=24", "set d_in=16")


def test_sparse_activations_with_rescaling(refused):
    settings = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": True}
    words = ("use_sparse_activations=True", "rescale_acts_by_decoder_norm=True", "set use_sparse_activations=False")
    refused(lambda: tiny.trainer(initializer=SETTINGS, **settings), *words)


def test_matryoshka_with_layer_norm(refused):
    settings = {"normalize_activations": "layer_norm", "initializer": SETTINGS}
    words = ("normalize_activations='layer_norm'", "matryoshka", "expected_average_only_in")
    refused(lambda: tiny.trainer("matryoshka_batchtopk", **settings), *words)


def test_topk_with_layer_norm_and_a_small_dead_window(refused):
    settings = {"normalize_activations": "layer_norm", "initializer": SETTINGS, "n_steps": 20}
    words = ("normalize_activations='layer_norm'", "dead_feature_window=5", "20 steps", "dead_feature_window=20")
    refused(lambda: tiny.trainer(dead_feature_window=5, **settings), *words)
    assert tiny.trainer(dead_feature_window=20, **settings).initialization_pending


def _spectrum(folder: Path, width: int) -> Path:
    moments = RunningMoments.zeros(width).update_(torch.randn(500, width))
    return Spectrum.from_moments(moments).save(folder / "spectrum.safetensors")


def test_a_spectrum_of_another_width(tmp_path, refused):
    path = _spectrum(tmp_path, 12)
    settings = ActiveSubspaceInit(d_init=4, spectrum=path)
    refused(lambda: tiny.trainer(initializer=settings), f"spectrum='{path}'", "width 12", "d_in=16")


@pytest.mark.parametrize("mode", ["layer_norm", "covariance_whitening"])
def test_a_spectrum_of_another_space(mode, tmp_path, refused):
    settings = ActiveSubspaceInit(d_init=4, spectrum=_spectrum(tmp_path, 16))
    words = ("raw activations", f"normalize_activations='{mode}'", "spectrum=None")
    refused(lambda: tiny.trainer("standard", initializer=settings, normalize_activations=mode), *words)


def test_a_spectrum_file_that_is_not_there(tmp_path):
    settings = ActiveSubspaceInit(d_init=4, spectrum=tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        tiny.trainer(initializer=settings)


def test_d_init_above_the_rank_of_the_spectrum(tmp_path, refused):
    moments = RunningMoments.zeros(16).update_(torch.randn(500, 3) @ torch.randn(3, 16))
    path = Spectrum.from_moments(moments).save(tmp_path / "flat.safetensors")
    trainer = tiny.trainer(initializer=ActiveSubspaceInit(d_init=4, spectrum=path))
    refused(trainer.fit, "d_init=4", "rank 3", "lower d_init")


def test_weights_that_are_not_fresh(refused):
    trainer = tiny.trainer(initializer=SETTINGS)
    trainer.sae.b_dec.data.fill_(0.5)
    refused(trainer.fit, "not freshly initialised", "initializer='default'")


def test_a_centre_that_an_sae_without_encoder_bias_cannot_take(refused):
    trainer = tiny.trainer("matching_pursuit", apply_b_dec_to_input=False, initializer=SETTINGS)
    refused(trainer.fit, "center='mean'", "apply_b_dec_to_input=True", "center='zeros'")


def test_a_norm_for_an_sae_whose_rows_have_norm_one(refused):
    trainer = tiny.trainer("matching_pursuit", initializer=ActiveSubspaceInit(d_init=4, n_tokens=256, norm=0.3))
    refused(trainer.fit, "norm=0.3", "least_squares")


def test_decoder_init_norm_that_is_none(refused):
    settings = ActiveSubspaceInit(d_init=4, n_tokens=256, norm="decoder_init_norm")
    trainer = tiny.trainer("standard", decoder_init_norm=None, initializer=settings)
    refused(trainer.fit, "norm='decoder_init_norm'", "decoder_init_norm=None")
