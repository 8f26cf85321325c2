import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelens_asi.sparse.shards import Group, Processes
from saelens_asi.spectra.moments import RunningMoments, _panels, _panels_of
from tests.helpers.processes import in_processes
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


def shared_moments(d, dtype):
    """Of the same batches in all processes; what is asked for in the middle, and at the end."""
    world = Processes.spread(1, "cpu").world
    x = (gaussian(0, 1500, d) + 3).to(dtype)
    moments = RunningMoments.zeros(d, group=world)
    for batch in x[:1000].split(300):
        moments.update_(batch)
    own_part = moments.scatter.clone()
    first = moments.together_().scatter.clone()
    moments.together_().update_(x[1000:])  # all of it in each, from here on
    moments.together_()
    return own_part, first, moments, world.traffic.calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("d", [3, 200, 770])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_processes_that_share_the_work_have_the_bits_of_one(n, d, dtype):
    ((_, first, whole, _),) = in_processes(1, shared_moments, d, dtype)  # of one thread, as each of several is
    told = in_processes(n, shared_moments, d, dtype)
    for _, own_first, own, n_calls in told:
        assert torch.equal(own_first, first)
        assert torch.equal(own.scatter, whole.scatter)
        assert torch.equal(own.mean, whole.mean)
        assert own.n_tokens == whole.n_tokens == 1500
        assert n_calls == 1
    parts = [part for part, *_ in told]
    assert int(sum((part != 0).int() for part in parts).max()) == 1  # nothing was computed twice
    assert torch.equal(sum(parts), first)


@pytest.mark.parametrize("d", [1, 95, 200, 401, 770, 4096])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 20])
def test_every_panel_has_one_process(n, d):
    owned = [panel for rank in range(n) for panel in _panels_of(d, Group(rank, n))]
    assert sorted(owned) == _panels(d)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_panels_of_wide_activations_are_shared_evenly(n):
    work = [sum((b - a) * (4096 - a) for a, b in _panels_of(4096, Group(rank, n))) for rank in range(n)]
    assert max(work) <= 1.1 * sum(work) / n


def test_a_part_of_shared_moments_is_no_covariance():
    moments = RunningMoments.zeros(3, group=Group(0, 2)).update_(gaussian(0, 9, 3))
    for use in (moments.covariance, lambda: moments.merged(Group()), lambda: moments.merge_(RunningMoments.zeros(3))):
        with pytest.raises(ValueError, match=r"2 processes share them.*together_\(\) first"):
            use()
    with pytest.raises(ValueError, match=r"together_\(\) first"):
        RunningMoments.zeros(3).merge_(moments)


def merged_moments(d, offset, sizes):
    """Each process has seen a part of the vectors; the last may have seen none."""
    world = Processes.spread(1, "cpu").world
    parts = (gaussian(0, sum(sizes), d) + offset).split(sizes)
    own = RunningMoments.zeros(d).update_(parts[world.rank])
    before = (own.n_tokens, own.mean.clone(), own.scatter.clone())
    merged = own.merged(world)
    assert_same(own, *before, tolerance=0)
    return merged


@pytest.mark.parametrize("offset", [0.0, -1000.0])
@pytest.mark.parametrize("sizes", [[40, 3], [7, 1, 0], [50, 9, 30, 2]])
def test_merging_processes_equals_a_single_pass(sizes, offset):
    x = gaussian(0, sum(sizes), 5) + offset
    told = in_processes(len(sizes), merged_moments, 5, offset, sizes)
    for merged in told:
        assert_same(merged, len(x), *two_pass_moments(x))
        assert torch.equal(merged.mean, told[0].mean)
        assert torch.equal(merged.scatter, told[0].scatter)


def test_a_process_that_is_alone_merges_to_what_it_has():
    moments = moments_of(gaussian(0, 50, 5) + 7)
    merged = moments.merged(Group())
    assert_same(merged, moments.n_tokens, moments.mean, moments.scatter, tolerance=0)
    assert RunningMoments.zeros(3).merged(Group()).n_tokens == 0
