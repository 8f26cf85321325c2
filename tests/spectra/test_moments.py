import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelens_asi.spectra.moments import RunningMoments
from tests.helpers.reference import gaussian, maths, orthogonal, two_pass_moments

seeds = st.integers(0, 2**31)
widths = st.integers(1, 9)
offsets = st.sampled_from([0.0, 1.0, -1000.0])
batch_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def moments_of(*batches):
    moments = RunningMoments.zeros(batches[0].shape[-1])
    for batch in batches:
        moments.update_(batch)
    return moments


def assert_same(moments, n_tokens, mean, scatter, tolerance=1e-10):
    """Equal to within ``tolerance`` of the largest entry."""
    assert moments.n_tokens == n_tokens
    assert (moments.mean - mean).abs().max() <= tolerance * mean.abs().max()
    assert (moments.scatter - scatter).abs().max() <= tolerance * scatter.abs().max()


@maths
@given(seeds, widths, offsets, batch_sizes)
def test_streaming_equals_full_batch(seed, d, offset, sizes):
    x = gaussian(seed, sum(sizes) + 1, d) + offset
    batches = x.split([*sizes, 1])
    assert_same(moments_of(*batches), len(x), *two_pass_moments(x))


@maths
@given(seeds, widths, offsets, st.integers(1, 50), st.integers(1, 50))
def test_batch_size_and_order_do_not_matter(seed, d, offset, size, other_size):
    x = gaussian(seed, 60, d) + offset
    shuffled = x[torch.randperm(60, generator=torch.Generator().manual_seed(seed))]
    one, other = moments_of(*x.split(size)), moments_of(*shuffled.split(other_size))
    assert_same(one, other.n_tokens, other.mean, other.scatter)


@maths
@given(seeds, widths, offsets, st.lists(st.integers(0, 30), min_size=2, max_size=4))
def test_merge_equals_single_pass(seed, d, offset, sizes):
    x = gaussian(seed, sum(sizes) + 2, d) + offset
    parts = x.split([*sizes, 2])
    merged = RunningMoments.zeros(d)
    for part in parts:
        merged.merge_(RunningMoments.zeros(d).update_(part))
    assert_same(merged, len(x), *two_pass_moments(x))


def test_merge_leaves_the_other_as_it_was():
    other = moments_of(gaussian(0, 10, 3))
    before = (other.n_tokens, other.mean.clone(), other.scatter.clone())
    RunningMoments.zeros(3).merge_(other).update_(gaussian(1, 10, 3))
    assert_same(other, *before, tolerance=0)


def test_a_mean_of_1000_deviations_costs_no_precision():
    """Eigenvalues of float32 activations far from zero, against two passes over the same values in float64."""
    x = (gaussian(0, 4000, 12) * torch.logspace(0, -2, 12, dtype=torch.float64) + 1000).float()
    covariance = moments_of(*x.split(100)).covariance()
    eigenvalues = torch.linalg.eigvalsh(covariance)
    expected = torch.linalg.eigvalsh(two_pass_moments(x)[1] / (len(x) - 1))
    assert (eigenvalues - expected).abs().max() <= 1e-6 * expected.max()


def test_covariance_is_bessel_corrected():
    x = gaussian(0, 7, 3)
    torch.testing.assert_close(moments_of(x).covariance(), torch.cov(x.T), rtol=1e-12, atol=0)


def test_covariance_of_one_token_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        moments_of(gaussian(0, 1, 3)).covariance()


def test_leading_dimensions_are_flattened():
    x = gaussian(0, 4, 5, 3)
    flat = moments_of(x.reshape(20, 3))
    assert_same(moments_of(x), 20, flat.mean, flat.scatter, tolerance=0)


def test_an_empty_batch_changes_nothing():
    x = gaussian(0, 5, 3)
    plain = moments_of(x)
    assert_same(moments_of(torch.zeros(0, 3), x, torch.zeros(0, 3)), 5, plain.mean, plain.scatter, tolerance=0)


def test_moments_are_float64_whatever_the_input():
    moments = moments_of(gaussian(0, 5, 3).bfloat16())
    assert (moments.mean.dtype, moments.scatter.dtype) == (torch.float64, torch.float64)


def test_no_graph_is_kept():
    x = gaussian(0, 5, 3).requires_grad_()
    assert not moments_of(x).scatter.requires_grad


def test_the_input_is_left_as_it_was():
    x = gaussian(0, 5, 3)
    before = x.clone()
    moments_of(x)
    assert torch.equal(x, before)


def test_a_device_without_float64_is_served_on_the_cpu():
    assert RunningMoments.zeros(3, "mps").scatter.device.type == "cpu"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_with_their_place_and_leave_the_moments_alone(bad):
    x = gaussian(0, 96, 3)
    moments = moments_of(x[:64])
    before = (moments.n_tokens, moments.mean.clone(), moments.scatter.clone())
    x[70, 1] = bad
    with pytest.raises(ValueError, match=r"activations 64 to 96 .*NaN or infinity"):
        moments.update_(x[64:])
    assert_same(moments, *before, tolerance=0)


def test_another_width_is_refused_with_both_widths():
    with pytest.raises(ValueError, match=r"width 5\b.*width 3\b"):
        RunningMoments.zeros(3).update_(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"width 5\b.*width 3\b"):
        RunningMoments.zeros(3).merge_(RunningMoments.zeros(5))


def far_from_zero(n, d):
    """Deviations that fall from 1 to 0.01 along random directions, around a mean 1000 times as long as the largest."""
    return gaussian(0, n, d) * torch.logspace(0, -2, d, dtype=torch.float64) @ orthogonal(1, d) + 1000 / d**0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [60, 200, 401])
@pytest.mark.parametrize("batch", [33, 700, 1300])
def test_eigenvalues_of_every_dtype_and_width_are_those_of_two_passes(dtype, d, batch):
    """1e-6 of the largest is asked for; the same values in float64 give 1e-12. Widths of one, two and four panels."""
    x = far_from_zero(1300, d).to(dtype)
    eigenvalues = torch.linalg.eigvalsh(moments_of(*x.split(batch)).scatter)
    expected = torch.linalg.eigvalsh(two_pass_moments(x)[1])
    assert (eigenvalues - expected).abs().max() <= 1e-11 * expected.max()


@pytest.mark.parametrize("d", [200, 401])
def test_the_scatter_matrix_is_symmetric_where_it_is_made_of_panels(d):
    scatter = moments_of(*gaussian(0, 90, d).split(40)).scatter
    torch.testing.assert_close(scatter, scatter.T, rtol=0, atol=1e-12 * float(scatter.max()))


def test_a_sum_that_overflows_is_no_infinity():
    x = torch.full((600, 3), 3e38)
    x[::2] = -1e38
    assert moments_of(x).n_tokens == 600
