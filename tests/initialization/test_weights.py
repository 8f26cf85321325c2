import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig

from saelens_asi.initialization import ActiveSubspaceInit, initialize_, norm, weights
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum
from tests.helpers.reference import gaussian, orthogonal

D_IN, D_SAE, D_INIT, K = 16, 64, 5, 4

ARCHITECTURES = {
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {}),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": K}),
    "topk_unscaled": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": False}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": K}),
    "abstopk": (AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig, {"k": K}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": K, "matryoshka_widths": [16, D_SAE]},
    ),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {}),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {}),
    "matching_pursuit": (MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig, {"max_iterations": 3}),
}
UNTIED = [name for name in ARCHITECTURES if name != "matching_pursuit"]
BIASES = ("b_enc", "b_gate", "b_mag")


def make_sae(name, seed=0, **changes):
    sae_class, config_class, options = ARCHITECTURES[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matching pursuit says that it sets decoder_init_norm to 1
        torch.manual_seed(seed)
        return sae_class(config_class(**{"d_in": D_IN, "d_sae": D_SAE, **copy.deepcopy(options), **changes}))


def make_activations():
    """600 vectors with a strong mean; 5 directions of width 1 to 3 hold nearly all of their variance."""
    strong = gaussian(0, 600, D_INIT) * torch.linspace(3, 1, D_INIT, dtype=torch.float64)
    mean = gaussian(1, D_IN) * 2
    return (strong @ orthogonal(2, D_IN)[:D_INIT] + 0.1 * gaussian(3, 600, D_IN) + mean).float()


X = make_activations()
SPECTRUM = Spectrum.from_moments(RunningMoments.zeros(D_IN).update_(X))
SAMPLE = X[:256]


def initialized(name, settings=None, *, spectrum=SPECTRUM, sample=SAMPLE, **changes):
    sae = make_sae(name, **changes)
    return sae, initialize_(sae, settings or ActiveSubspaceInit(d_init=D_INIT), spectrum, sample)


@torch.no_grad()
def error(sae, x=SAMPLE):
    return float((x.double() - sae.decode(sae.encode(x)).double()).square().sum())


@torch.no_grad()
def error_at(sae, factor):
    """Reconstruction error with the decoder rows, and the encoder tied to them, ``factor`` times as long."""
    sae = copy.deepcopy(sae)
    sae.W_dec.mul_(factor)
    sae.W_enc.mul_(factor)
    if not sae.cfg.apply_b_dec_to_input:  # the encoder biases then stand for the centre
        for name in BIASES:
            if hasattr(sae, name):
                getattr(sae, name).mul_(factor)
    return error(sae)


def assert_rows_inside(sae, basis):
    rows = sae.W_dec.detach().double()
    outside = rows - rows @ basis @ basis.T
    assert outside.norm(dim=1).max() < 1e-5 * rows.norm(dim=1).min()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoder_rows_lie_in_the_active_subspace(name):
    sae, result = initialized(name)
    assert_rows_inside(sae, SPECTRUM.principal_directions(D_INIT))
    assert torch.linalg.matrix_rank(sae.W_dec.detach(), rtol=1e-4) == D_INIT  # and fill it
    assert result.d_init == D_INIT


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoder_rows_have_the_one_norm_that_is_reported(name):
    sae, result = initialized(name)
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.full((D_SAE,), result.norm), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{}, {"norm": 0.3}, {"center": "zeros"}], ids=str)
def test_the_encoder_is_the_transposed_decoder(name, settings):
    if name == "matching_pursuit" and "norm" in settings:
        settings = {"norm": 1.0}
    sae, _ = initialized(name, ActiveSubspaceInit(d_init=D_INIT, **settings))
    assert torch.equal(sae.W_enc, sae.W_dec.T)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_decoder_bias_is_the_mean_or_zero_and_the_other_biases_are_zero(name):
    for center, expected in [("mean", X.mean(dim=0)), ("zeros", torch.zeros(D_IN))]:
        sae, _ = initialized(name, ActiveSubspaceInit(d_init=D_INIT, center=center))
        torch.testing.assert_close(sae.b_dec.detach(), expected, rtol=1e-5, atol=1e-5)
        assert not any(getattr(sae, bias).any() for bias in BIASES if hasattr(sae, bias))


@pytest.mark.parametrize("name", UNTIED)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("center", ["mean", "zeros"])
def test_the_least_squares_norm_is_the_minimum_of_the_error(name, apply_b_dec_to_input, center):
    settings = ActiveSubspaceInit(d_init=D_INIT, center=center)
    sae, _ = initialized(name, settings, apply_b_dec_to_input=apply_b_dec_to_input)
    errors = {factor: error_at(sae, factor) for factor in (0.8, 0.95, 0.99, 1, 1.01, 1.05, 1.25)}
    assert min(errors, key=errors.get) == 1
    assert errors[0.8] > 1.02 * errors[1] < errors[1.25]  # and not a plateau


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_the_least_squares_norm_sees_through_per_token_normalization(normalization):
    sae = make_sae("standard", normalize_activations=normalization)
    seen = sae.run_time_activation_norm_fn_in(X)
    spectrum = Spectrum.from_moments(RunningMoments.zeros(D_IN).update_(seen))
    sae, _ = initialized("standard", spectrum=spectrum, normalize_activations=normalization)
    errors = {factor: error_at(sae, factor) for factor in (0.8, 0.95, 0.99, 1, 1.01, 1.05, 1.25)}
    assert min(errors, key=errors.get) == 1
    assert not {"ln_mu", "ln_std", "x_norm_coeff"} & set(vars(sae))  # nothing left over


def test_the_least_squares_norm_settles_where_the_threshold_selects_features():
    """One more least-squares step at the norm that was found leaves it where it is."""
    sae, result = initialized("jumprelu", jumprelu_init_threshold=1.0)
    with torch.no_grad():
        r = sae.decode(sae.encode(SAMPLE)) - sae.b_dec
        factor = float(((SAMPLE - sae.b_dec) * r).sum() / r.square().sum()) ** 0.5
        assert 0.05 < float((sae.encode(SAMPLE) > 0).float().mean()) < 0.45  # the threshold does select
    assert factor == pytest.approx(1, abs=2e-3)
    assert result.norm > 0


def test_a_threshold_that_nothing_reaches_is_refused():
    with pytest.raises(ValueError, match="no feature fires on the sample at norm 1"):
        initialized("jumprelu", jumprelu_init_threshold=1e6)


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_the_norm_does_not_depend_on_how_the_sample_is_split(name, monkeypatch):
    _, whole = initialized(name)
    monkeypatch.setattr(norm, "MAX_DENSE_VALUES", 10 * D_SAE)
    _, split = initialized(name)
    assert split.norm == pytest.approx(whole.norm, rel=1e-5)
    assert split.initial_nmse == pytest.approx(whole.initial_nmse, rel=1e-5)


@pytest.mark.parametrize("name", UNTIED)
@pytest.mark.parametrize("norm", ["least_squares", 0.7])
def test_an_encoder_that_is_not_given_b_dec_encodes_relative_to_the_centre_all_the_same(name, norm):
    settings = ActiveSubspaceInit(d_init=D_INIT, norm=norm)
    centred, expected = initialized(name, settings, apply_b_dec_to_input=True)
    shifted, result = initialized(name, settings, apply_b_dec_to_input=False)
    assert result.norm == pytest.approx(expected.norm, rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(shifted.encode(SAMPLE), centred.encode(SAMPLE), rtol=1e-3, atol=1e-4)
    assert result.initial_nmse == pytest.approx(expected.initial_nmse, rel=1e-3)


def test_a_centre_without_a_bias_to_hold_it_is_refused():
    with pytest.raises(ValueError, match="apply_b_dec_to_input=True for MatchingPursuitTrainingSAE"):
        initialized("matching_pursuit", apply_b_dec_to_input=False)
    initialized("matching_pursuit", ActiveSubspaceInit(d_init=D_INIT, center="zeros"), apply_b_dec_to_input=False)


@pytest.mark.parametrize("norm", ["least_squares", "decoder_init_norm", 1, 1.0])
def test_matching_pursuit_keeps_unit_rows(norm):
    sae, result = initialized("matching_pursuit", ActiveSubspaceInit(d_init=D_INIT, norm=norm))
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-6)
    assert result.norm == 1


def test_matching_pursuit_refuses_another_norm():
    with pytest.raises(ValueError, match=r"norm=0\.5 does not suit MatchingPursuitTrainingSAE.*norm 1\.0"):
        initialized("matching_pursuit", ActiveSubspaceInit(d_init=D_INIT, norm=0.5))


@pytest.mark.parametrize(("norm", "expected"), [(0.7, 0.7), (2, 2), ("decoder_init_norm", 0.25)])
def test_a_norm_that_is_given_is_used(norm, expected):
    sae, result = initialized("topk", ActiveSubspaceInit(d_init=D_INIT, norm=norm), decoder_init_norm=0.25)
    assert result.norm == expected
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.full((D_SAE,), float(expected)))


def test_decoder_init_norm_without_a_number_is_refused():
    with pytest.raises(ValueError, match="decoder_init_norm=None"):
        initialized("topk", ActiveSubspaceInit(d_init=D_INIT, norm="decoder_init_norm"), decoder_init_norm=None)


def test_weights_that_are_not_fresh_are_refused_and_kept():
    sae = make_sae("topk")
    sae.b_dec.data[3] = 1e-3
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(ValueError, match=r"not freshly initialised .*b_dec is not zero.*initializer='default'"):
        initialize_(sae, ActiveSubspaceInit(d_init=D_INIT), SPECTRUM, SAMPLE)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_a_second_initialization_is_refused():
    sae, _ = initialized("topk")
    with pytest.raises(ValueError, match="not freshly initialised"):
        initialize_(sae, ActiveSubspaceInit(d_init=D_INIT), SPECTRUM, SAMPLE)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_weights_are_written_in_place(name, apply_b_dec_to_input):
    """An optimizer made before keeps hold of the parameters."""
    sae = make_sae(name, apply_b_dec_to_input=apply_b_dec_to_input)
    before = dict(sae.named_parameters())
    storage = {key: value.data_ptr() for key, value in before.items()}
    center = "zeros" if name == "matching_pursuit" else "mean"
    initialize_(sae, ActiveSubspaceInit(d_init=D_INIT, center=center), SPECTRUM, SAMPLE)
    after = dict(sae.named_parameters())
    assert before.keys() == after.keys()
    for key, parameter in after.items():
        assert parameter is before[key]
        assert parameter.data_ptr() == storage[key]
        assert parameter.requires_grad
        assert parameter.grad is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_bfloat16_sae_is_initialised_within_its_precision(name):
    sae, result = initialized(name, dtype="bfloat16")
    _, expected = initialized(name)
    assert sae.W_dec.dtype == torch.bfloat16
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    norms = sae.W_dec.detach().float().norm(dim=1)
    torch.testing.assert_close(norms, torch.full((D_SAE,), result.norm), rtol=0.01, atol=0)
    assert result.norm == pytest.approx(expected.norm, rel=0.02)
    assert result.initial_nmse == pytest.approx(expected.initial_nmse, rel=0.05)
    torch.testing.assert_close(sae.b_dec.detach().float(), X.mean(dim=0), rtol=0.01, atol=0.01)


def test_the_weights_depend_on_the_seed_alone():
    sae, _ = initialized("topk", seed=1)
    same, _ = initialized("topk", seed=2)  # another random start of the SAE itself
    other, _ = initialized("topk", ActiveSubspaceInit(d_init=D_INIT, seed=1), seed=1)
    assert torch.equal(sae.W_dec, same.W_dec)
    assert not torch.equal(sae.W_dec, other.W_dec)


def test_global_randomness_is_untouched():
    sae = make_sae("topk")
    before = torch.get_rng_state()
    initialize_(sae, ActiveSubspaceInit(d_init=D_INIT), SPECTRUM, SAMPLE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_reported_error_is_the_error_of_the_sae(name):
    sae, result = initialized(name)
    variance = float((SAMPLE.double() - SAMPLE.double().mean(dim=0)).square().sum())
    assert result.initial_nmse == pytest.approx(error(sae) / variance, rel=1e-4)


def test_the_norm_can_be_fitted_under_another_activation_function():
    sae = make_sae("batchtopk")
    own, of_topk = sae.activation_fn, make_sae("topk").activation_fn
    result = initialize_(sae, ActiveSubspaceInit(d_init=D_INIT), SPECTRUM, SAMPLE, of_topk)
    assert sae.activation_fn is own
    assert result.norm == pytest.approx(initialized("topk")[1].norm, rel=1e-6)
    assert result.norm > 1.05 * initialized("batchtopk")[1].norm  # which the longest tokens of the batch bring down
    variance = float((SAMPLE.double() - SAMPLE.double().mean(dim=0)).square().sum())
    assert result.initial_nmse == pytest.approx(error(sae) / variance, rel=1e-4)  # of the SAE as it will train


def test_the_activation_function_comes_back_after_an_error():
    sae = make_sae("batchtopk")
    own = sae.activation_fn
    with pytest.raises(ValueError, match="no feature fires"):
        initialize_(sae, ActiveSubspaceInit(d_init=D_INIT), SPECTRUM, SAMPLE, torch.nn.Threshold(1e9, 0.0))
    assert sae.activation_fn is own


def test_the_reported_variance_is_that_inside_the_subspace():
    for d_init in (1, 3, D_INIT):
        _, result = initialized("topk", ActiveSubspaceInit(d_init=d_init))
        assert result.variance_explained == pytest.approx(SPECTRUM.variance_explained(d_init), rel=1e-10)


def test_the_random_subspace_has_the_same_dimension_and_holds_its_own_variance():
    sae, result = initialized("topk", ActiveSubspaceInit(d_init=D_INIT, subspace="random"))
    assert torch.linalg.matrix_rank(sae.W_dec.detach(), rtol=1e-4) == result.d_init == D_INIT
    basis = torch.linalg.svd(sae.W_dec.detach().double()).Vh[:D_INIT].T
    share = float((basis.T @ SPECTRUM.covariance @ basis).trace()) / SPECTRUM.total_variance
    assert result.variance_explained == pytest.approx(share, rel=1e-5)
    assert result.variance_explained < 0.9 < initialized("topk")[1].variance_explained


def test_the_full_space_holds_all_variance():
    sae, result = initialized("topk", ActiveSubspaceInit(d_init=D_INIT, subspace="full"))
    assert torch.linalg.matrix_rank(sae.W_dec.detach(), rtol=1e-4) == result.d_init == D_IN
    assert result.variance_explained == pytest.approx(1)


def test_the_active_subspace_starts_with_a_lower_error_than_its_controls():
    start = {
        subspace: initialized("topk", ActiveSubspaceInit(d_init=D_INIT, subspace=subspace))[1].initial_nmse
        for subspace in ("active", "random", "full")
    }
    assert start["active"] < 0.8 * min(start["random"], start["full"])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_activations_are_understood():
    options = {"rescale_acts_by_decoder_norm": False, "use_sparse_activations": True}
    sae, result = initialized("topk", **options)
    assert sae.encode(SAMPLE).is_sparse
    assert result.norm == pytest.approx(initialized("topk_unscaled")[1].norm, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "changes", "message"),
    [
        ("topk", {"d_init": 17}, {}, f"d_init=17 exceeds d_in={D_IN}"),
        ("matching_pursuit", {"d_init": 3}, {"apply_b_dec_to_input": False}, "center='mean'"),
        ("matching_pursuit", {"d_init": 3, "norm": 0.5}, {}, "norm=0.5"),
        ("topk", {"d_init": 3, "norm": "decoder_init_norm"}, {"decoder_init_norm": None}, "decoder_init_norm=None"),
    ],
)
def test_settings_that_do_not_suit_leave_the_sae_alone(name, settings, changes, message):
    """So that they can be changed, and the same SAE initialised."""
    sae = make_sae(name, **changes)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialize_(sae, ActiveSubspaceInit(**settings), SPECTRUM, SAMPLE)
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


def test_any_object_with_the_right_weights_will_do():
    """The mathematics needs no SAELens class."""

    class LinearSAE(torch.nn.Module):
        cfg = SimpleNamespace(decoder_init_norm=0.1, apply_b_dec_to_input=True, d_sae=D_SAE)

        def __init__(self):
            super().__init__()
            self.W_dec = torch.nn.Parameter(torch.ones(D_SAE, D_IN))
            self.W_enc = torch.nn.Parameter(torch.ones(D_IN, D_SAE))
            self.b_dec = torch.nn.Parameter(torch.zeros(D_IN))

        def encode(self, x):
            return (x - self.b_dec) @ self.W_enc

        def decode(self, acts):
            return acts @ self.W_dec + self.b_dec

    sae = LinearSAE()
    result = initialize_(sae, ActiveSubspaceInit(d_init=D_INIT), SPECTRUM, SAMPLE)
    # 64 unit vectors drawn evenly in 5 dimensions sum to about 64/5 times the identity there.
    assert result.norm == pytest.approx((D_INIT / D_SAE) ** 0.5, rel=0.2)
    assert result.initial_nmse < 0.2


def passes(name, fit=None, **changes):
    """What an initialization gives to ``encode``, and the layouts of what it gives to ``decode``."""
    sae, encoded, decoded = make_sae(name, **changes), [], []
    encode, decode = sae.encode, sae.decode
    sae.encode = lambda x: encoded.append(x) or encode(x)
    sae.decode = lambda acts: decoded.append((acts.layout, tuple(acts.shape))) or decode(acts)
    initialize_(sae, ActiveSubspaceInit(d_init=D_INIT), SPECTRUM, SAMPLE, fit)
    return encoded, decoded


@pytest.mark.parametrize("name", ["topk", "topk_unscaled", "abstopk", "batchtopk", "matryoshka"])
def test_the_topk_family_is_encoded_once_and_decoded_from_what_fires(name):
    encoded, decoded = passes(name)
    assert len(encoded) == 1
    assert decoded == [(torch.sparse_coo, (1, D_SAE)), (torch.sparse_coo, (256, D_SAE))]


def test_two_activation_functions_select_from_one_encoding():
    encoded, decoded = passes("batchtopk", make_sae("topk").activation_fn)
    assert len(encoded) == 1
    assert [shape for _, shape in decoded] == [(1, D_SAE), (256, D_SAE), (256, D_SAE)]


@pytest.mark.parametrize("name", ["standard", "gated"])
def test_other_architectures_are_encoded_as_often_as_the_norm_needs_to_settle(name):
    encoded, decoded = passes(name)
    assert len(encoded) == 2
    assert decoded == [(torch.strided, (1, D_SAE)), (torch.strided, (256, D_SAE))] * 2


def test_bfloat16_which_torch_multiplies_densely_alone_is_decoded_densely():
    _, decoded = passes("topk", dtype="bfloat16")
    assert {layout for layout, _ in decoded} == {torch.strided}


def test_an_activation_function_with_a_threshold_is_fitted_step_by_step():
    """In the place of TopK, which selects the same at any scale, it does not."""
    sae = make_sae("topk")
    result = initialize_(sae, ActiveSubspaceInit(d_init=D_INIT), SPECTRUM, SAMPLE, torch.nn.Threshold(0.3, 0.0))
    own = sae.activation_fn
    sae.activation_fn = torch.nn.Threshold(0.3, 0.0)
    with torch.no_grad():
        r = sae.decode(sae.encode(SAMPLE)) - sae.b_dec
        assert float(((SAMPLE - sae.b_dec) * r).sum() / r.square().sum()) == pytest.approx(1, abs=4e-3)
    sae.activation_fn = own
    variance = float((SAMPLE.double() - SAMPLE.double().mean(dim=0)).square().sum())
    assert result.initial_nmse == pytest.approx(error(sae) / variance, rel=1e-4)


def test_sparse_activations_of_an_sae_stay_sparse():
    _, expected = initialized("topk")
    _, result = initialized("topk", use_sparse_activations=True)
    assert (result.norm, result.initial_nmse) == pytest.approx((expected.norm, expected.initial_nmse), rel=1e-6)


def test_directions_are_drawn_into_the_decoder_itself(monkeypatch):
    """At a million features another decoder beside it is gigabytes."""
    seen, draw = [], weights.random_directions_
    monkeypatch.setattr(weights, "random_directions_", lambda out, *rest: seen.append(out) or draw(out, *rest))
    sae, _ = initialized("topk", dtype="bfloat16")
    assert [out.data_ptr() for out in seen] == [sae.W_dec.data_ptr()]
