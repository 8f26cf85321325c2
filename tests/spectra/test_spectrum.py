import dataclasses
import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from saelens_asi.spectra.hook_spectra import load_pass, save_pass
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum, principal_angles
from tests.helpers.damage import Hostile, damages
from tests.helpers.reference import effective_rank_by_svd, gaussian, maths, orthogonal, two_pass_moments

seeds = st.integers(0, 2**31)
scales = st.floats(1e-3, 1e3)


def with_variances(variances, n_tokens=10_000, seed=None):
    """A spectrum with these variances along the axes, or along random directions where a seed is given."""
    covariance = torch.diag(torch.as_tensor(variances, dtype=torch.float64))
    if seed is not None:
        q = orthogonal(seed, len(variances))
        covariance = q @ covariance @ q.T
    return Spectrum(torch.zeros(len(variances), dtype=torch.float64), covariance, n_tokens)


def spectrum_of(x):
    return Spectrum.from_moments(RunningMoments.zeros(x.shape[-1]).update_(x))


@given(seeds, scales)
@settings(max_examples=20, deadline=None)
def test_gamma_is_the_mean_over_the_deviation_in_whatever_unit(seed, scale):
    x = gaussian(seed, 400, 5) + 2.0
    by_hand = x.double().mean(0).norm() / (x.double() - x.double().mean(0)).square().sum(1).mean().sqrt()
    for spectrum in (spectrum_of(scale * x), spectrum_of(x).scaled(scale)):
        assert spectrum.gamma == pytest.approx(float(by_hand), rel=1e-2)


def test_gamma_without_variance_is_not_a_number():
    assert math.isnan(with_variances([0.0, 0.0]).gamma)


@pytest.mark.parametrize("d", [1, 2, 17])
def test_effective_rank_of_isotropic_activations_is_d(d):
    assert with_variances([3.0] * d).effective_rank == pytest.approx(d, rel=1e-12)
    assert with_variances([3.0] * d, seed=0).effective_rank == pytest.approx(d, rel=1e-12)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_effective_rank_of_k_equal_values_is_k(k):
    assert with_variances([0.5] * k + [0.0] * 7).effective_rank == pytest.approx(k, rel=1e-12)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_effective_rank_of_geometric_singular_values_has_its_closed_form(ratio):
    """Singular values ratio^i: the entropy of a geometric distribution is -ln(1 - r) - r ln(r) / (1 - r)."""
    d = math.ceil(math.log(1e-14) / math.log(ratio))
    entropy = -math.log(1 - ratio) - ratio * math.log(ratio) / (1 - ratio)
    spectrum = with_variances([ratio ** (2 * i) for i in range(d)])
    assert spectrum.effective_rank == pytest.approx(math.exp(entropy), rel=1e-10)


@maths
@given(seeds, st.integers(1, 8), st.integers(2, 30))
def test_effective_rank_is_that_of_the_centred_activations(seed, d, n):
    x = gaussian(seed, n, d) * torch.logspace(0, -1, d, dtype=torch.float64) + 5
    # Null directions leave eigenvalues of 1e-16, hence singular values of 1e-8 where the SVD has 1e-16.
    assert spectrum_of(x).effective_rank == pytest.approx(effective_rank_by_svd(x), rel=1e-5)


@maths
@given(seeds, st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=10), scales)
def test_effective_rank_ignores_scale_and_rotation_and_is_at_most_d(seed, variances, scale):
    plain = with_variances(variances).effective_rank
    assert 1 - 1e-12 <= plain <= len(variances) * (1 + 1e-12)
    assert with_variances([scale * v for v in variances]).effective_rank == pytest.approx(plain, rel=1e-9)
    assert with_variances(variances, seed=seed).effective_rank == pytest.approx(plain, rel=1e-6)


@maths
@given(st.lists(st.floats(0, 100), min_size=1, max_size=10).filter(lambda v: sum(v) > 1), st.floats(0.01, 0.999))
def test_intrinsic_dimension_is_the_smallest_that_holds_tau(variances, tau):
    ordered = sorted(variances, reverse=True)
    shares = [math.fsum(ordered[: k + 1]) / math.fsum(ordered) for k in range(len(ordered))]
    if any(abs(share - tau) < 1e-12 for share in shares):
        return
    expected = next(k for k, share in enumerate(shares, start=1) if share >= tau)
    assert with_variances(variances).intrinsic_dimension(tau) == expected


def test_intrinsic_dimension_of_halving_variances():
    spectrum = with_variances([1, 8, 2, 4, 1], seed=3)
    dimensions = [spectrum.intrinsic_dimension(tau) for tau in (0.4, 0.51, 0.76, 0.9, 0.99)]
    assert dimensions == [1, 2, 3, 4, 5]
    assert with_variances([1, 1, 1, 1]).intrinsic_dimension(0.5) == 2  # reached exactly
    assert with_variances([1, 1, 1, 1]).intrinsic_dimension(1) == 4
    assert with_variances([1] * 99 + [100.0]).intrinsic_dimension() == 99  # tau is 0.99 unless told: 198 of 199


@pytest.mark.parametrize("tau", [0, -0.1, 1.01, float("nan")])
def test_tau_outside_its_range_is_refused(tau):
    with pytest.raises(ValueError, match=f"tau={tau}"):
        with_variances([1.0, 1.0]).intrinsic_dimension(tau)


@maths
@given(seeds, st.integers(2, 12), st.sampled_from([0.0, 100.0]))
def test_rank_of_n_samples_is_at_most_n_minus_1(seed, n, offset):
    d = 8
    x = (gaussian(seed, n, d) + offset).float()
    assert spectrum_of(x).rank == min(n - 1, d)
    assert with_variances([1.0] * d, n_tokens=n).rank == min(n - 1, d)  # also where rounding fills the covariance


@pytest.mark.parametrize("k", [1, 3, 6])
def test_rank_counts_the_directions_that_vary(k):
    x = gaussian(0, 200, k) @ gaussian(1, k, 10) + 3
    assert spectrum_of(x).rank == k


def test_singular_values_are_those_of_the_centred_matrix():
    x = gaussian(0, 50, 6) + 10
    expected = torch.linalg.svdvals(x - x.mean(dim=0))
    torch.testing.assert_close(spectrum_of(x).singular_values, expected, rtol=1e-10, atol=0)


def test_variances_come_largest_first_and_sum_to_the_total():
    spectrum = with_variances([1.0, 9.0, 4.0], seed=0)
    torch.testing.assert_close(spectrum.variances, torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64))
    assert spectrum.total_variance == pytest.approx(14)


def test_rounding_never_gives_a_negative_variance():
    x = gaussian(0, 4, 30)
    assert spectrum_of(x).variances.min() >= 0


def test_total_variance_is_the_mean_squared_distance_from_the_mean():
    x = gaussian(0, 50, 6) + 10
    expected = float((x - x.mean(dim=0)).square().sum()) / 49
    assert spectrum_of(x).total_variance == pytest.approx(expected, rel=1e-12)


@maths
@given(seeds, st.integers(1, 6))
def test_principal_directions_are_the_top_right_singular_vectors(seed, k):
    x = gaussian(seed, 80, 6) * torch.tensor([32, 16, 8, 4, 2, 1.0]) @ orthogonal(seed, 6) + 7
    directions = spectrum_of(x).principal_directions(k)
    torch.testing.assert_close(directions.T @ directions, torch.eye(k, dtype=torch.float64))
    v = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False).Vh[:k]
    torch.testing.assert_close(directions @ directions.T, v.T @ v, rtol=0, atol=1e-8)


def test_variance_explained_is_the_variance_of_the_projection():
    x = gaussian(0, 80, 6) * torch.tensor([32, 16, 8, 4, 2, 1.0])
    spectrum = spectrum_of(x)
    projected = x @ spectrum.principal_directions(2)
    expected = float(projected.var(dim=0).sum() / x.var(dim=0).sum())
    assert spectrum.variance_explained(2) == pytest.approx(expected, rel=1e-10)
    assert spectrum.variance_explained(6) == pytest.approx(1)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_a_number_of_directions_outside_the_width_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k} .* d=3"):
        with_variances([1.0, 2.0, 3.0]).principal_directions(k)


def test_save_then_load_is_bit_exact(tmp_path):
    spectrum = spectrum_of(gaussian(0, 50, 6) + 10)
    path = spectrum.save(tmp_path / "new" / "folder" / "spectrum.safetensors")
    loaded = Spectrum.load(path)
    assert torch.equal(loaded.mean, spectrum.mean)
    assert torch.equal(loaded.covariance, spectrum.covariance)
    assert (loaded.mean.dtype, loaded.n_tokens) == (torch.float64, 50)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_load_refuses_a_foreign_safetensors_file(tmp_path, metadata):
    path = tmp_path / "weights.safetensors"
    save_file({"mean": torch.zeros(3), "covariance": torch.eye(3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a spectrum file: .*saelens_asi\.spectrum\.v1"):
        Spectrum.load(path)


@maths
@given(seeds, scales)
def test_scaled_is_the_spectrum_of_the_scaled_activations(seed, factor):
    x = gaussian(seed, 40, 4) + 2
    scaled, expected = spectrum_of(x).scaled(factor), spectrum_of(x * factor)
    torch.testing.assert_close(scaled.mean, expected.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(scaled.covariance, expected.covariance, rtol=1e-9, atol=1e-9 * factor**2)
    assert scaled.n_tokens == 40


def test_from_moments_is_a_snapshot():
    x = gaussian(0, 40, 4) + 2
    moments = RunningMoments.zeros(4).update_(x)
    spectrum = Spectrum.from_moments(moments)
    moments.update_(gaussian(1, 40, 4) * 9)
    mean, scatter = two_pass_moments(x)
    torch.testing.assert_close(spectrum.mean, mean)
    torch.testing.assert_close(spectrum.covariance, scatter / 39)


def test_a_spectrum_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        with_variances([1.0]).n_tokens = 3


def test_relative_singular_values_and_the_count_above_a_share():
    spectrum = with_variances([100.0, 25.0, 1.0, 0.0625, 0.0], seed=1)
    expected = torch.tensor([1, 0.5, 0.1, 0.025, 0], dtype=torch.float64)
    torch.testing.assert_close(spectrum.relative_singular_values, expected, atol=1e-6, rtol=0)
    assert [spectrum.components_above(share) for share in (0.9, 0.3, 0.05, 0.02)] == [1, 2, 3, 4]
    assert spectrum.components_above() == 3  # 5 % unless told


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_a_share_that_means_nothing_is_refused(share):
    with pytest.raises(ValueError, match=f"share={share}"):
        with_variances([1.0, 1.0]).components_above(share)


def test_activations_that_never_vary_have_rank_zero():
    spectrum = with_variances([0.0, 0.0, 0.0])
    assert spectrum.effective_rank == 0
    assert spectrum.relative_singular_values.tolist() == [0, 0, 0]
    assert spectrum.components_above(0.05) == 0


@maths
@given(seeds, st.integers(1, 8), st.integers(2, 40), st.integers(2, 40), st.sampled_from([0.0, 1000.0]))
def test_merge_equals_a_single_pass(seed, d, n, m, offset):
    x = gaussian(seed, n + m, d) + offset
    merged = spectrum_of(x[:n]).merge(spectrum_of(x[n:]))
    expected = spectrum_of(x)
    assert merged.n_tokens == n + m
    torch.testing.assert_close(merged.mean, expected.mean, rtol=1e-12, atol=1e-12)
    tolerance = 1e-10 * float(expected.covariance.abs().max())
    torch.testing.assert_close(merged.covariance, expected.covariance, rtol=0, atol=tolerance)


def test_merge_is_a_new_spectrum_also_from_files(tmp_path):
    x = gaussian(0, 50, 4)
    first, second = spectrum_of(x[:20]), spectrum_of(x[20:])
    before = (first.mean.clone(), first.covariance.clone())
    paths = [s.save(tmp_path / f"{i}.safetensors") for i, s in enumerate((first, second))]
    merged = Spectrum.load(paths[0]).merge(Spectrum.load(paths[1]))
    torch.testing.assert_close(merged.covariance, spectrum_of(x).covariance)
    assert torch.equal(first.mean, before[0])
    assert torch.equal(first.covariance, before[1])


def test_spectra_of_two_widths_neither_merge_nor_have_angles():
    narrow, wide = with_variances([1.0, 2.0]), with_variances([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"width 3\b.*width 2\b"):
        narrow.merge(wide)
    with pytest.raises(ValueError, match="widths 2 and 3"):
        principal_angles(narrow, wide, 1)


@pytest.mark.parametrize("angle", [0, 1e-9, 1e-4, 0.3, 1.2, math.pi / 2])
def test_principal_angles_of_planes_that_are_turned(angle):
    """span(e1, e2) and span(cos e1 + sin e3, e2): one angle is zero, the other the turn; also where it is tiny."""
    turn = torch.eye(4, dtype=torch.float64)
    turn[0, 0] = turn[2, 2] = math.cos(angle)
    turn[2, 0], turn[0, 2] = math.sin(angle), -math.sin(angle)
    first = with_variances([5.0, 3.0, 1.0, 0.5])
    second = Spectrum(first.mean, turn @ first.covariance @ turn.T, first.n_tokens)
    expected = torch.tensor([0, angle], dtype=torch.float64)
    torch.testing.assert_close(principal_angles(first, second, 2), expected, atol=1e-12, rtol=1e-6)


@maths
@given(seeds, st.integers(1, 5))
def test_principal_angles_are_symmetric_and_zero_to_oneself(seed, k):
    first = spectrum_of(gaussian(seed, 30, 6))
    second = spectrum_of(gaussian(seed + 1, 30, 6))
    angles = principal_angles(first, second, k)
    assert (angles[1:] >= angles[:-1]).all()
    assert 0 <= angles.min() <= angles.max() <= math.pi / 2 + 1e-12
    torch.testing.assert_close(angles, principal_angles(second, first, k), atol=1e-7, rtol=0)
    assert principal_angles(first, first, k).max() < 1e-7


@pytest.mark.parametrize("decay", [1.0, 0.98, 0.9])
@pytest.mark.parametrize("tokens_per_dimension", [2, 8])
def test_the_shift_says_how_far_off_a_small_sample_is(decay, tokens_per_dimension):
    """Against draws whose true spectrum is known, it is right to a third of itself, or to 0.6 % of the rank."""
    d = 128
    scales = decay ** torch.arange(d, dtype=torch.float64)
    truth = with_variances(scales.square().tolist()).effective_rank
    sample = spectrum_of(gaussian(1, tokens_per_dimension * d, d) * scales)
    off = sample.effective_rank / truth - 1
    assert off < -0.005
    assert sample.effective_rank_shift == pytest.approx(off, rel=0.35, abs=0.006)


def test_only_a_small_sample_is_warned_of():
    assert with_variances([1.0] * 10, n_tokens=160).sample_size_warning() is None
    spectrum = with_variances([1.0] * 10, n_tokens=50)
    expected = rf"50 tokens are few for width 10: .* {-spectrum.effective_rank_shift:.1%} too low.*160 tokens or more"
    assert re.search(expected, spectrum.sample_size_warning())
    assert -0.1 < spectrum.effective_rank_shift < -0.01


def test_a_file_of_the_first_format_is_read(tmp_path):
    """As version 0.1 wrote it: the format must never change under its name."""
    path = tmp_path / "old.safetensors"
    tensors = {"mean": torch.ones(2, dtype=torch.float64), "covariance": torch.eye(2, dtype=torch.float64)}
    save_file(tensors, path, metadata={"format": "saelens_asi.spectrum.v1", "spectrum": '{"n_tokens": 7}'})
    spectrum = Spectrum.load(path)
    assert (spectrum.n_tokens, spectrum.effective_rank) == (7, pytest.approx(2))
    with safe_open(path, "pt") as old, safe_open(spectrum.save(tmp_path / "new.safetensors"), "pt") as new:
        assert new.metadata().items() >= old.metadata().items()
        assert sorted(old.keys()) == sorted(new.keys())


@pytest.mark.parametrize("d", [3, 8, 17])
def test_what_is_read_back_lies_in_memory_as_torch_allocates_it(tmp_path, d):
    """Products of tensors that lie otherwise are added in another order on some processors."""
    moments = RunningMoments.zeros(d).update_(gaussian(0, 50, d))
    spectrum = Spectrum.load(Spectrum.from_moments(moments).save(tmp_path / "spectrum.safetensors"))
    save_pass(tmp_path / "pass.safetensors", {"a hook": moments}, {}, {})
    continued = load_pass(tmp_path / "pass.safetensors", {})[0]["a hook"]
    for tensor in (spectrum.mean, spectrum.covariance, continued.mean, continued.scatter):
        assert tensor.data_ptr() % 64 == 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return spectrum_of(gaussian(0, 50, 6) + 10).save(tmp_path_factory.mktemp("saved") / "spectrum.safetensors")


@settings(max_examples=100, deadline=None)
@given(damage=damages())
def test_damaged_files_are_refused_or_right(damage, saved, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "spectrum.safetensors"
    path.write_bytes(saved.read_bytes())
    damage.apply(path)
    whole = found = Spectrum.load(saved)
    refused = str(path)
    try:
        found = Spectrum.load(path)
    except ValueError as error:
        refused = str(error)
    assert str(path) in refused
    assert torch.equal(found.mean, whole.mean)
    assert torch.equal(found.covariance, whole.covariance)
    assert found.n_tokens == whole.n_tokens


def test_a_name_in_the_header_that_is_damaged_is_no_sign_of_an_older_version(saved, tmp_path):
    path = tmp_path / "spectrum.safetensors"
    content = saved.read_bytes()
    path.write_bytes(content[:-1].replace(b'"checksum"', b'"checks:m"') + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"its header has \['checks:m'\]"):
        Spectrum.load(path)


EYE = torch.eye(3, dtype=torch.float64)
MEAN = torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("tensors", "n_tokens", "message"),
    [
        ({"mean": MEAN}, 9, r"holds \['mean'\], not mean and covariance"),
        ({"mean": MEAN, "covariance": EYE, "more": EYE.clone()}, 9, "not mean and covariance"),
        ({"mean": MEAN[:2], "covariance": EYE}, 9, r"shapes \(2,\) and \(3, 3\)"),
        ({"mean": MEAN, "covariance": EYE[0]}, 9, r"shapes \(3,\) and \(3,\)"),
        ({"mean": MEAN.float(), "covariance": EYE}, 9, "float32 and torch.float64, not float64"),
        ({"mean": MEAN / 0, "covariance": EYE}, 9, "NaN or infinity"),
        ({"mean": MEAN, "covariance": EYE * torch.inf}, 9, "NaN or infinity"),
        ({"mean": MEAN, "covariance": EYE.cumsum(1)}, 9, "not symmetric"),
        ({"mean": MEAN, "covariance": EYE - 0.5}, 9, "negative eigenvalues"),
        ({"mean": MEAN, "covariance": -EYE}, 9, "negative eigenvalues"),
        ({"mean": MEAN, "covariance": EYE}, 1, "number of tokens, 1,"),
        ({"mean": MEAN, "covariance": EYE}, "9", "number of tokens, '9',"),
        ({"mean": MEAN, "covariance": EYE}, None, "number of tokens, None,"),
    ],
)
def test_a_file_without_a_mean_and_covariance_is_refused(tensors, n_tokens, message, tmp_path):
    path = tmp_path / "spectrum.safetensors"
    metadata = {"format": "saelens_asi.spectrum.v1", "spectrum": json.dumps({"n_tokens": n_tokens})}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    with pytest.raises(ValueError, match=rf"spectrum\.safetensors cannot be used: .*{message}"):
        Spectrum.load(path)


def test_covariances_of_low_rank_and_constant_activations_are_not_refused(tmp_path):
    for x in (gaussian(0, 3, 40), gaussian(0, 500, 2) @ gaussian(1, 2, 40) * 1e4, torch.ones(5, 4)):
        path = spectrum_of(x).save(tmp_path / "spectrum.safetensors")
        assert Spectrum.load(path).d == x.shape[1]


def test_a_pickle_is_not_executed(tmp_path):
    path = tmp_path / "spectrum.safetensors"
    torch.save(Hostile(tmp_path / "executed"), path)
    with pytest.raises(ValueError, match=r"spectrum\.safetensors is not a safetensors file"):
        Spectrum.load(path)
    assert not (tmp_path / "executed").exists()
