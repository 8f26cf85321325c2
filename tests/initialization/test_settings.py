import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelens_asi.initialization import ActiveSubspaceInit, choose_d_init, random_directions_, subspace_basis
from saelens_asi.spectra.spectrum import Spectrum
from tests.helpers.reference import gaussian, maths, orthogonal


def with_variances(variances, n_tokens=10_000, seed=0):
    """A spectrum with these variances along random directions."""
    q = orthogonal(seed, len(variances))
    covariance = q @ torch.diag(torch.as_tensor(variances, dtype=torch.float64)) @ q.T
    return Spectrum(gaussian(seed, len(variances)), covariance, n_tokens)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def directions(n, basis, seed=0, **options):
    out = torch.empty(n, basis.shape[0])
    random_directions_(out, basis, generator(seed), **options)
    return out


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("d_init", 0),
        ("d_init", -3),
        ("d_init", 0.0),
        ("d_init", -0.2),
        ("d_init", 1.5),
        ("d_init", float("nan")),
        ("d_init", float("inf")),
        ("d_init", "half"),
        ("d_init", True),
        ("d_init", None),
        ("n_tokens", 1),
        ("n_tokens", 0),
        ("n_tokens", 1e4),
        ("n_tokens", True),
        ("n_tokens", "many"),
        ("norm", 0),
        ("norm", -0.1),
        ("norm", float("nan")),
        ("norm", float("inf")),
        ("norm", "unit"),
        ("norm", "a positive number"),
        ("norm", True),
        ("norm", None),
        ("center", "median"),
        ("center", None),
        ("subspace", "dead"),
        ("subspace", 1),
        ("seed", 0.5),
        ("seed", "0"),
        ("seed", True),
        ("seed", None),
        ("spectrum", 3),
    ],
)
def test_a_bad_setting_is_refused_with_its_name_and_value(setting, value):
    with pytest.raises(ValueError, match=f"^{setting}=") as error:
        ActiveSubspaceInit(**{setting: value})
    assert str(value) in str(error.value)


def test_a_spectrum_object_in_place_of_its_path_is_refused():
    with pytest.raises(ValueError, match="save the spectrum first"):
        ActiveSubspaceInit(spectrum=with_variances([1.0, 2.0]))


@pytest.mark.parametrize("n_tokens", [767, 768])
def test_too_few_tokens_for_d_init_are_refused_with_both_numbers(n_tokens):
    with pytest.raises(ValueError, match=f"n_tokens={n_tokens} .* d_init=768.* at least 769"):
        ActiveSubspaceInit(d_init=768, n_tokens=n_tokens)


def test_tokens_are_not_counted_where_they_do_not_limit_the_subspace():
    ActiveSubspaceInit(d_init=768, n_tokens=769)
    ActiveSubspaceInit(d_init=768, n_tokens=10, subspace="random")
    ActiveSubspaceInit(d_init=768, n_tokens=10, spectrum="spectrum.safetensors")


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ActiveSubspaceInit().seed = 3


def test_a_width_below_d_init_is_refused_with_both_numbers():
    ActiveSubspaceInit(d_init=16).check_width(16)
    with pytest.raises(ValueError, match="d_init=900 exceeds d_in=576"):
        ActiveSubspaceInit(d_init=900).check_width(576)


def test_a_fraction_below_one_dimension_is_refused():
    with pytest.raises(ValueError, match=r"d_init=0\.01 of d_in=16"):
        ActiveSubspaceInit(d_init=0.01).check_width(16)


def test_paper_is_the_papers_recipe():
    paper = ActiveSubspaceInit.paper()
    assert (paper.center, paper.norm, paper.subspace) == ("zeros", "least_squares", "active")
    assert choose_d_init(paper, with_variances([1.0] * 64)) == 12  # 768 / 4096 of 64
    assert paper.d_init * 4096 == 768


def test_paper_takes_changes():
    assert ActiveSubspaceInit.paper(d_init=5, seed=3) == ActiveSubspaceInit(d_init=5, center="zeros", seed=3)


@maths
@given(
    st.builds(
        ActiveSubspaceInit,
        d_init=st.integers(1, 99) | st.floats(0.01, 1) | st.just("auto"),
        n_tokens=st.integers(100, 10**6) | st.just("auto"),
        norm=st.floats(1e-3, 1e3) | st.sampled_from([1, "least_squares", "decoder_init_norm"]),
        center=st.sampled_from(["mean", "zeros"]),
        subspace=st.sampled_from(["active", "random", "full"]),
        seed=st.integers(-5, 2**31),
        spectrum=st.none() | st.just("a/b.safetensors"),
    )
)
def test_settings_survive_json(settings):
    restored = ActiveSubspaceInit.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert restored == settings
    assert type(restored.d_init) is type(settings.d_init)  # 1 is a dimension, 1.0 all of d_in


def test_a_path_becomes_a_string():
    assert ActiveSubspaceInit(spectrum=Path("a") / "b").to_dict()["spectrum"] == "a/b"


def test_from_dict_refuses_an_unknown_setting_and_names_the_known():
    with pytest.raises(ValueError, match=r"\['d_inti'\].*'d_init'"):
        ActiveSubspaceInit.from_dict({"d_inti": 3})


def test_from_dict_checks_values():
    with pytest.raises(ValueError, match="seed='x'"):
        ActiveSubspaceInit.from_dict({"seed": "x"})


@pytest.mark.parametrize(
    ("d_init", "expected"), [(3, 3), (8, 8), (0.5, 4), (0.3, 2), (1.0, 8), ("auto", 2), (1, 1), (0.125, 1)]
)
def test_d_init_is_a_dimension_a_fraction_or_90_percent_of_the_variance(d_init, expected):
    spectrum = with_variances([60.0, 31.0, 3, 2, 1, 1, 1, 1])
    assert choose_d_init(ActiveSubspaceInit(d_init=d_init), spectrum) == expected


def test_auto_tokens_are_32_for_each_dimension_of_d_in():
    assert ActiveSubspaceInit().tokens_for(576) == 32 * 576
    assert ActiveSubspaceInit(n_tokens=1000).tokens_for(576) == 1000


def test_a_fraction_that_needs_more_tokens_than_given_is_refused_once_the_width_is_known():
    with pytest.raises(ValueError, match="n_tokens=100 is too few for d_init=128"):
        ActiveSubspaceInit(d_init=0.5, n_tokens=100).check_width(256)


def test_auto_without_a_number_of_features_holds_exactly_90_percent_or_more():
    assert choose_d_init(ActiveSubspaceInit(), with_variances([60.0, 29.0, 6, 1, 1, 1, 1, 1])) == 3


def test_auto_is_an_eighth_of_d_in_and_more_for_crowds():
    flat = with_variances([1.0] * 512)
    chosen = [choose_d_init(ActiveSubspaceInit(), flat, d_sae) for d_sae in (64, 14 * 512, 2 * 14 * 512, 2**30)]
    assert chosen == [64, 64, 91, 128]
    assert choose_d_init(ActiveSubspaceInit(d_init=3), flat, 2**30) == 3
    # One threshold for all tokens leaves behind what crowds: a quarter from the first.
    assert choose_d_init(ActiveSubspaceInit(), flat, 64, over_batch=True) == 128
    assert choose_d_init(ActiveSubspaceInit(d_init=3), flat, 64, over_batch=True) == 3


def test_auto_stays_inside_of_what_varies():
    """No more dimensions than hold 99 %; sixteen, or all that there are, where an eighth is fewer."""
    assert choose_d_init(ActiveSubspaceInit(), with_variances([1.0] * 20 + [1e-6] * 492), 8192) == 20
    assert choose_d_init(ActiveSubspaceInit(), with_variances([1.0] * 64), 512) == 16
    assert choose_d_init(ActiveSubspaceInit(), with_variances([1.0] * 8), 512) == 8
    assert choose_d_init(ActiveSubspaceInit(), with_variances([1.0] * 512, n_tokens=31), 8192) == 30


@pytest.mark.parametrize("d_init", [7, 0.9])
def test_d_init_above_the_rank_of_the_sample_is_refused_with_both(d_init):
    few_tokens = with_variances([1.0] * 8, n_tokens=7)
    flat = with_variances([1.0] * 6 + [0.0] * 2)
    for spectrum in (few_tokens, flat):
        with pytest.raises(ValueError, match=f"d_init=7 exceeds the rank 6 of {spectrum.n_tokens} centred"):
            choose_d_init(ActiveSubspaceInit(d_init=d_init), spectrum)


def test_the_controls_do_not_need_the_rank():
    flat = with_variances([1.0] * 6 + [0.0] * 2)
    assert choose_d_init(ActiveSubspaceInit(d_init=7, subspace="random"), flat) == 7
    assert choose_d_init(ActiveSubspaceInit(d_init=3, subspace="full"), flat) == 8


def test_the_active_basis_spans_the_top_principal_directions():
    spectrum = with_variances([9.0, 7.0, 5.0, 0.3, 0.2, 0.1])
    basis = subspace_basis(ActiveSubspaceInit(d_init=3), spectrum, generator())
    top = orthogonal(0, 6)[:, :3]
    torch.testing.assert_close(basis @ basis.T, top @ top.T, rtol=0, atol=1e-10)


def test_the_random_basis_has_the_same_dimension_but_lies_elsewhere():
    spectrum = with_variances([9.0, 7.0, 5.0, *[0.1] * 29])
    settings = ActiveSubspaceInit(d_init=3, subspace="random")
    basis = subspace_basis(settings, spectrum, generator())
    assert basis.shape == subspace_basis(ActiveSubspaceInit(d_init=3), spectrum, generator()).shape
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    overlap = float((spectrum.principal_directions(3).T @ basis).square().sum()) / 3
    assert overlap < 0.3  # 3 / 32 is expected of a random subspace, 1 of the active one
    assert torch.equal(basis, subspace_basis(settings, spectrum, generator()))
    assert not torch.equal(basis, subspace_basis(settings, spectrum, generator(1)))


def test_full_has_no_basis_and_covers_all_of_d_in():
    settings = ActiveSubspaceInit(d_init=3, subspace="full")
    assert subspace_basis(settings, with_variances([9.0, 7.0, 5.0, 0.1]), generator()) is None
    out = torch.empty(50, 4)
    random_directions_(out, None, generator())
    assert torch.linalg.svdvals(out).min() > 1


@maths
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(0, 40))
def test_directions_are_unit_vectors_in_the_span(seed, d_init, n):
    basis = orthogonal(seed, 12)[:, :d_init]
    rows = directions(n, basis, seed).double()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows @ basis @ basis.T, rows, rtol=0, atol=1e-6)


def test_directions_cover_the_sphere_evenly():
    """Moments of the uniform distribution on the sphere in k dimensions: mean 0, covariance I/k, E u^4 = 3/(k(k+2))."""
    k, n = 6, 40_000
    basis = orthogonal(0, 16)[:, :k]
    u = directions(n, basis).double() @ basis
    # Five standard errors: those of u, u_i u_j and u^4 over n samples are at most 0.0021, 0.0010 and 0.0009.
    assert u.mean(dim=0).abs().max() < 0.0105
    assert (u.T @ u / n - torch.eye(k) / k).abs().max() < 0.005
    assert (u.pow(4).mean(dim=0) - 3 / (k * (k + 2))).abs().max() < 0.0045


def test_a_seed_decides_the_directions():
    basis = orthogonal(0, 8)[:, :3]
    assert torch.equal(directions(20, basis, seed=1), directions(20, basis, seed=1))
    assert not torch.equal(directions(20, basis, seed=1), directions(20, basis, seed=2))


@pytest.mark.parametrize("chunk", [16, 32, 48])
@pytest.mark.parametrize("d_init", [1, 5])
def test_chunks_of_a_multiple_of_16_rows_draw_the_same_directions(chunk, d_init):
    """torch draws normal values sixteen at a time, so that other chunks give other (equally good) directions."""
    basis = orthogonal(0, 8)[:, :d_init]
    torch.testing.assert_close(directions(96, basis, chunk=chunk), directions(96, basis), rtol=0, atol=1e-6)


def test_an_uneven_chunk_still_fills_every_row_once():
    rows = directions(23, orthogonal(0, 8)[:, :3], chunk=5)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(23), rtol=0, atol=1e-6)
    assert (rows @ rows.T).fill_diagonal_(0).max() < 0.9999


def test_the_default_chunk_is_a_multiple_of_16():
    assert random_directions_.__defaults__[-1] % 16 == 0


def test_directions_take_the_dtype_of_the_output():
    out = torch.empty(4, 8, dtype=torch.bfloat16)
    random_directions_(out, orthogonal(0, 8)[:, :3], generator())
    assert torch.equal(out, directions(4, orthogonal(0, 8)[:, :3]).bfloat16())


def test_global_randomness_is_untouched():
    before = torch.get_rng_state()
    subspace_basis(ActiveSubspaceInit(d_init=3, subspace="random"), with_variances([1.0] * 8), generator())
    directions(20, orthogonal(0, 8)[:, :3])
    assert torch.equal(torch.get_rng_state(), before)
