import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from saelens_asi.sparse.rows import RowGradient
from saelens_asi.sparse_adam import SparseAdam, adam_update_
from tests.helpers.reference import gaussian, maths, row_adam

BIAS_CORRECTIONS = ("per_row", "global")
both_corrections = pytest.mark.parametrize("bias_correction", BIAS_CORRECTIONS)
BETAS = (0.9, 0.999)


def parameter(*shape, seed=0, dtype=torch.float64):
    return nn.Parameter(gaussian(seed, *shape).to(dtype))


def take_steps(optimizer, param, grads):
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()


def order_one(seed, *shape):
    """Gradients of either sign and size 0.5 to 1.5."""
    x = gaussian(seed, *shape)
    return x.sign() * (0.5 + (x.abs() % 1))


def rows_active(seed, n_steps, *shape, share=0.5):
    """Gradients of which each row is zero in about half of the steps."""
    active = torch.rand(n_steps, shape[0], 1, generator=torch.Generator().manual_seed(seed)) < share
    return order_one(seed, n_steps, *shape) * active


def as_sparse(grad):
    """The rows with gradient, as a sparse tensor."""
    rows = grad.flatten(1).any(dim=1).nonzero().squeeze(1)
    return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape, check_invariants=True)


def bits(optimizer, param):
    return [param.detach(), *(optimizer.state[param][key] for key in sorted(optimizer.state[param]))]


def assert_same_bits(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@both_corrections
@pytest.mark.parametrize("row_dim", [None, 0, 1])
@pytest.mark.parametrize("betas", [BETAS, (0.0, 0.99), (0.5, 0.0)])
def test_equals_adam_when_every_row_is_active(bias_correction, row_dim, betas):
    ours, theirs = parameter(5, 3), parameter(5, 3)
    optimizer = SparseAdam([ours], lr=0.01, betas=betas, bias_correction=bias_correction, row_dim=row_dim)
    reference = torch.optim.Adam([theirs], lr=0.01, betas=betas)
    grads = gaussian(1, 50, 5, 3)
    take_steps(optimizer, ours, grads)
    take_steps(reference, theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[ours][key], reference.state[theirs][key], rtol=1e-12, atol=1e-15)


@both_corrections
def test_equals_adam_in_float32_from_the_first_step(bias_correction):
    """The bias corrections of the first steps lose no digits: the step is right to 1e-6 of itself."""
    ours, theirs = nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(5, 3))
    optimizer = SparseAdam([ours], lr=1.0, bias_correction=bias_correction, row_dim=0)
    reference = torch.optim.Adam([theirs], lr=1.0)
    for grad in gaussian(1, 5, 5, 3).float():
        take_steps(optimizer, ours, [grad])
        take_steps(reference, theirs, [grad])
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_equals_torch_sparse_adam_on_the_same_sparse_gradients():
    """torch adds eps to the root before its bias correction, sqrt(1 - beta2^t) >= 0.03, and we after it.

    With gradients of at least 0.5 the root is at least 0.5 * 0.03, a step hence differs by a share of at most
    eps / 0.015 = 7e-7 of at most 3.2 lr: over 30 steps of lr = 0.01, less than 1e-6. Nothing else may differ.
    """
    ours, theirs = parameter(20, 3), parameter(20, 3)
    optimizer = SparseAdam([ours], lr=0.01, bias_correction="global")
    reference = torch.optim.SparseAdam([theirs], lr=0.01)
    grads = [as_sparse(grad) for grad in rows_active(1, 30, 20, 3)]
    take_steps(optimizer, ours, grads)
    take_steps(reference, theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[ours][key], reference.state[theirs][key], rtol=1e-12, atol=1e-15)


@maths
@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from([0.2, 0.6, 1.0]),
    st.sampled_from(BIAS_CORRECTIONS),
    st.sampled_from(["adam", "sparse_adam"]),
    st.sampled_from([0, 1]),
)
def test_equals_the_update_written_out_number_by_number(
    seed, n_rows, width, n_steps, share, correction, placement, row_dim
):
    start, grads = gaussian(seed, n_rows, width), rows_active(seed, n_steps, n_rows, width, share=share)
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "bias_correction": correction, "eps_placement": placement}
    expected = row_adam(start, list(grads), **options)
    param = nn.Parameter(start.movedim(0, row_dim).clone())
    optimizer = SparseAdam([param], row_dim=row_dim, **options)
    take_steps(optimizer, param, grads.movedim(1, 1 + row_dim))
    state = optimizer.state[param]
    for ours, theirs in zip((param, state["exp_avg"], state["exp_avg_sq"]), expected, strict=True):
        torch.testing.assert_close(ours.detach().movedim(row_dim, 0), theirs, rtol=1e-11, atol=1e-13)


@both_corrections
def test_a_dense_gradient_with_zero_rows_is_a_sparse_gradient(bias_correction):
    dense, sparse = parameter(20, 3), parameter(20, 3)
    dense_optimizer = SparseAdam([dense], bias_correction=bias_correction, row_dim=0)
    sparse_optimizer = SparseAdam([sparse], bias_correction=bias_correction)
    for grad in rows_active(1, 30, 20, 3):
        take_steps(dense_optimizer, dense, [grad])
        take_steps(sparse_optimizer, sparse, [as_sparse(grad)])
        assert_same_bits(bits(dense_optimizer, dense), bits(sparse_optimizer, sparse))


@both_corrections
@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_without_gradient_keep_parameter_and_moments_bit_for_bit(bias_correction, row_dim, dtype):
    param = nn.Parameter(gaussian(0, 6, 3).movedim(0, row_dim).contiguous().to(dtype))
    optimizer = SparseAdam([param], lr=0.1, bias_correction=bias_correction, row_dim=row_dim)
    grads = rows_active(1, 20, 6, 3).movedim(1, 1 + row_dim).to(dtype)
    take_steps(optimizer, param, grads[:10])
    for grad in grads[10:]:
        before = [x.detach().clone() for x in (param, *(optimizer.state[param][k] for k in ("exp_avg", "exp_avg_sq")))]
        take_steps(optimizer, param, [grad])
        after = (param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"])
        active = (grad != 0).any(dim=1 - row_dim)
        for old, new in zip(before, after, strict=True):
            same = (old == new).all(dim=1 - row_dim)
            assert same[~active].all()
            assert not same[active].any()


def test_without_row_dim_a_dense_gradient_moves_every_entry_as_adam_does():
    ours, theirs = parameter(6, 3), parameter(6, 3)
    grads = rows_active(1, 20, 6, 3)
    take_steps(SparseAdam([ours], lr=0.01), ours, grads)
    take_steps(torch.optim.Adam([theirs], lr=0.01), theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def first_step_of_a_row_that_fires_at_step_1001(bias_correction):
    param = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = SparseAdam([param], lr=1.0, bias_correction=bias_correction, row_dim=0)
    first, second = torch.tensor([[1.0, 1, 1], [0, 0, 0]]).double(), torch.tensor([[0.0, 0, 0], [1, 1, 1]]).double()
    take_steps(optimizer, param, [first] * 1000 + [second])
    return param.detach()[1].abs()


def test_a_row_that_first_fires_late_takes_an_ordinary_first_step_per_row():
    step = first_step_of_a_row_that_fires_at_step_1001("per_row")
    torch.testing.assert_close(step, torch.ones_like(step), rtol=1e-6, atol=0)


def test_a_row_that_first_fires_late_moves_two_and_a_half_learning_rates_with_global_correction():
    step = first_step_of_a_row_that_fires_at_step_1001("global")
    expected = 0.1 / (1 - 0.9**1001) / (0.001 / (1 - 0.999**1001)) ** 0.5
    assert expected > 2.4
    torch.testing.assert_close(step, torch.full_like(step, expected), rtol=1e-6, atol=0)


@both_corrections
def test_repeated_indices_are_summed_before_the_update(bias_correction):
    repeated, summed = parameter(4, 2), parameter(4, 2)
    values = order_one(1, 3, 2)
    uncoalesced = torch.sparse_coo_tensor(torch.tensor([[2, 0, 2]]), values, (4, 2), check_invariants=True)
    once = torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), torch.stack([values[1], values[0] + values[2]]), (4, 2), check_invariants=True
    )
    assert not uncoalesced.is_coalesced()
    one = SparseAdam([repeated], bias_correction=bias_correction)
    other = SparseAdam([summed], bias_correction=bias_correction)
    for _ in range(3):
        repeated.grad, summed.grad = uncoalesced, once
        one.step()
        other.step()
    assert_same_bits(bits(one, repeated), bits(other, summed))


@both_corrections
@pytest.mark.parametrize("sparse", [True, False])
def test_a_gradient_without_any_row_changes_no_row(bias_correction, sparse):
    param = parameter(4, 2)
    optimizer = SparseAdam([param], bias_correction=bias_correction, row_dim=0)
    take_steps(optimizer, param, order_one(1, 3, 4, 2))
    empty = as_sparse(torch.zeros(4, 2, dtype=torch.float64)) if sparse else torch.zeros(4, 2, dtype=torch.float64)
    before = {key: value.clone() for key, value in optimizer.state[param].items() if key != "step"}
    value = param.detach().clone()
    take_steps(optimizer, param, [empty])
    assert torch.equal(param, value)
    assert all(torch.equal(optimizer.state[param][key], old) for key, old in before.items())


def test_a_gradient_sparse_along_more_than_rows_is_refused():
    param = parameter(4, 2)
    param.grad = gaussian(1, 4, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse_dim=2"):
        SparseAdam([param]).step()


@both_corrections
def test_entries_of_a_vector_are_rows(bias_correction):
    """A vector and the column that holds it are updated alike."""
    vector = parameter(7)
    column = nn.Parameter(vector.detach().clone()[:, None])
    grads = rows_active(1, 20, 7, 1)
    take_steps(SparseAdam([vector], bias_correction=bias_correction, row_dim=0), vector, grads.squeeze(2))
    take_steps(SparseAdam([column], bias_correction=bias_correction, row_dim=0), column, grads)
    assert torch.equal(vector, column.squeeze(1))


def test_rows_of_a_tensor_with_three_dimensions():
    """The middle dimension of (2, 5, 3) against the same numbers as a (5, 6) matrix."""
    cube = parameter(2, 5, 3)
    matrix = nn.Parameter(cube.detach().movedim(1, 0).reshape(5, 6).clone())
    grads = rows_active(1, 20, 5, 6)
    take_steps(SparseAdam([matrix], row_dim=0), matrix, grads)
    take_steps(SparseAdam([cube], row_dim=1), cube, grads.reshape(20, 5, 2, 3).movedim(1, 2))
    assert torch.equal(cube.detach().movedim(1, 0).reshape(5, 6), matrix)


def test_a_scalar_parameter_is_updated():
    ours, theirs = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    take_steps(SparseAdam([ours]), ours, [torch.tensor(0.3)])
    take_steps(torch.optim.Adam([theirs]), theirs, [torch.tensor(0.3)])
    torch.testing.assert_close(ours, theirs)


def test_a_parameter_without_gradient_is_left_alone():
    with_grad, without = parameter(3, 2), parameter(3, 2)
    before = without.detach().clone()
    optimizer = SparseAdam([with_grad, without], row_dim=0)
    take_steps(optimizer, with_grad, order_one(1, 2, 3, 2))
    assert torch.equal(without, before)
    assert without not in optimizer.state


def test_the_closure_is_called_and_its_loss_returned():
    param = parameter(3, 2)
    optimizer = SparseAdam([param], row_dim=0)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    before = param.detach().clone()
    assert optimizer.step(closure).item() == pytest.approx(float(before.square().sum()))
    assert not torch.equal(param, before)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@both_corrections
@pytest.mark.parametrize("silent_moments", ["keep", "decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resuming_from_a_saved_state_is_bit_exact(bias_correction, silent_moments, dtype):
    groups = lambda w, b: [{"params": [w], "row_dim": 1}, {"params": [b], "row_dim": 0}, {"params": []}]  # noqa: E731
    weight, bias = parameter(3, 6, dtype=dtype), parameter(6, seed=1, dtype=dtype)
    optimizer = SparseAdam(
        groups(weight, bias), lr=0.02, bias_correction=bias_correction, silent_moments=silent_moments
    )
    grads = rows_active(1, 20, 6, 3).to(dtype)

    def run(optimizer, weight, bias, grads):
        for grad in grads:
            weight.grad, bias.grad = grad.T.clone(), grad[:, 0].clone()
            optimizer.step()

    run(optimizer, weight, bias, grads[:10])
    resumed_weight, resumed_bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    resumed = SparseAdam(groups(resumed_weight, resumed_bias))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, weight, bias, grads[10:])
    run(resumed, resumed_weight, resumed_bias, grads[10:])
    assert_same_bits(bits(resumed, resumed_weight), bits(optimizer, weight))
    assert_same_bits(bits(resumed, resumed_bias), bits(optimizer, bias))


def test_a_loaded_state_shares_no_memory_with_the_saved_one():
    param = parameter(3, 2)
    optimizer = SparseAdam([param], row_dim=0)
    take_steps(optimizer, param, order_one(1, 2, 3, 2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["state"][0])
    resumed_param = nn.Parameter(param.detach().clone())
    resumed = SparseAdam([resumed_param], row_dim=0)
    resumed.load_state_dict(saved)
    take_steps(resumed, resumed_param, order_one(2, 2, 3, 2))
    assert all(torch.equal(saved["state"][0][key], value) for key, value in kept.items())


def test_the_state_of_another_optimizer_is_refused_with_what_to_do():
    param = parameter(3, 2)
    adam = torch.optim.Adam([param])
    take_steps(adam, param, order_one(1, 2, 3, 2))
    optimizer = SparseAdam([param], row_dim=0)
    with pytest.raises(ValueError, match=r"not written by saelens_asi\.SparseAdam .*bias_correction.*optimizer='adam'"):
        optimizer.load_state_dict(adam.state_dict())
    assert not optimizer.state


def test_learning_rate_schedulers_work():
    """A first step, and every later one with the same gradient, moves the learning rate of that step."""
    param = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = SparseAdam([param], lr=0.1, row_dim=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1, 0.5, 0, 0.25][step])
    moved = []
    for _ in range(4):
        before = param.detach().clone()
        take_steps(optimizer, param, [torch.ones(2, 2, dtype=torch.float64)])
        moved.append(float((before - param.detach()).max()))
        if len(moved) < 4:
            scheduler.step()
    assert moved == pytest.approx([0.1, 0.05, 0, 0.025], abs=1e-8)


def test_groups_have_their_own_options():
    fast, slow = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    optimizer = SparseAdam([{"params": [fast], "lr": 0.5}, {"params": [slow], "row_dim": 0}], lr=0.1)
    grad = torch.tensor([[1.0, 0], [0, 0]])
    fast.grad, slow.grad = grad.clone(), grad.clone()
    optimizer.step()
    torch.testing.assert_close(fast.detach(), -0.5 * grad)
    torch.testing.assert_close(slow.detach(), -0.1 * grad)


@both_corrections
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_low_precision_parameters_are_float32_also_after_loading(bias_correction, dtype):
    param = parameter(3, 2, dtype=dtype)
    optimizer = SparseAdam([param], bias_correction=bias_correction, row_dim=0)
    take_steps(optimizer, param, order_one(1, 2, 3, 2).to(dtype))
    other = SparseAdam([nn.Parameter(param.detach().clone())], row_dim=0)
    other.load_state_dict(optimizer.state_dict())
    for one in (optimizer, other):
        (state,) = one.state.values()
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.float32, torch.float32)
        assert state["step"] == 2
        assert bias_correction == "global" or (state["row_step"].dtype, state["row_step"].tolist()) == (
            torch.int32,
            [2, 2, 2],
        )
    assert param.dtype == dtype


def test_small_moments_of_bfloat16_parameters_are_not_rounded_away():
    """beta2 = 0.999 moves the second moment by 1/1000 of a step, below bfloat16's resolution of 1/256."""
    param = parameter(1, 1, dtype=torch.bfloat16)
    optimizer = SparseAdam([param], row_dim=0)
    take_steps(optimizer, param, [torch.ones(1, 1, dtype=torch.bfloat16)] * 2000)
    assert float(optimizer.state[param]["exp_avg_sq"]) == pytest.approx(1 - 0.999**2000, rel=1e-3)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", -0.1, r"lr=-0\.1"),
        ("lr", float("nan"), "lr=nan"),
        ("eps", -1e-8, "eps=-1e-08"),
        ("eps", float("nan"), "eps=nan"),
        ("betas", (0.9, 1.0), r"betas=\(0\.9, 1\.0\)"),
        ("betas", (-0.1, 0.9), r"betas=\(-0\.1, 0\.9\)"),
        ("betas", (0.9,), r"betas=\(0\.9,\)"),
        ("bias_correction", "local", "bias_correction='local'"),
        ("eps_placement", "torch", "eps_placement='torch' must be one of"),
        ("silent_moments", True, "silent_moments=True must be one of"),
        ("row_dim", 2, r"row_dim=2 .*\(3, 2\)"),
        ("row_dim", -1, r"row_dim=-1 .*\(3, 2\)"),
    ],
)
def test_a_bad_option_is_refused_also_in_a_group(option, value, message):
    with pytest.raises(ValueError, match=message):
        SparseAdam([parameter(3, 2)], **{option: value})
    with pytest.raises(ValueError, match=message):
        SparseAdam([{"params": [parameter(3, 2)], option: value}])


def test_switching_to_per_row_mid_run_counts_rows_from_there():
    """Rows that had fired go on past their first step; a row that had not takes an ordinary first step."""
    param = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = SparseAdam([param], lr=1.0, bias_correction="global", row_dim=0)
    one = torch.ones(2, dtype=torch.float64)
    take_steps(optimizer, param, [torch.stack([one, 0 * one, 0 * one])] * 100)
    optimizer.param_groups[0]["bias_correction"] = "per_row"
    before = param.detach().clone()
    take_steps(optimizer, param, [torch.stack([one, one, 0 * one])])
    moved = (before - param.detach())[:, 0]
    torch.testing.assert_close(moved, torch.tensor([1.0, 1.0, 0.0]).double(), rtol=1e-6, atol=0)
    assert optimizer.state[param]["row_step"].tolist() == [101, 1, 0]


def test_switching_to_global_mid_run_takes_effect():
    param = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = SparseAdam([param], lr=1.0, bias_correction="per_row", row_dim=0)
    take_steps(optimizer, param, [torch.tensor([[1.0], [0.0]]).double()] * 1000)
    optimizer.param_groups[0]["bias_correction"] = "global"
    take_steps(optimizer, param, [torch.tensor([[0.0], [1.0]]).double()])
    assert param[1].abs().item() == pytest.approx(2.5, abs=0.1)


@both_corrections
def test_works_with_a_sparse_embedding(bias_correction):
    embedding, dense = nn.Embedding(8, 3, sparse=True).double(), nn.Embedding(8, 3).double()
    with torch.no_grad():
        embedding.weight.copy_(gaussian(0, 8, 3))
        dense.weight.copy_(gaussian(0, 8, 3))
    start = embedding.weight.detach().clone()
    optimizer = SparseAdam(embedding.parameters(), lr=0.1, bias_correction=bias_correction)
    dense_optimizer = SparseAdam(dense.parameters(), lr=0.1, bias_correction=bias_correction, row_dim=0)
    for tokens in ([1, 4, 1], [4, 6], [1]):
        for layer, one in ((embedding, optimizer), (dense, dense_optimizer)):
            one.zero_grad()
            layer(torch.tensor(tokens)).square().sum().backward()
            one.step()
    assert embedding.weight.grad.is_sparse
    changed = (embedding.weight.detach() != start).any(dim=1)
    assert changed.nonzero().squeeze(1).tolist() == [1, 4, 6]
    torch.testing.assert_close(embedding.weight, dense.weight, rtol=1e-12, atol=1e-14)


class DenseUpdate:
    """A ``RowUpdate`` that moves every entry by ``adam_update_``."""

    def __init__(self, params, grads):
        self.params, self.grads, self.steps = params, grads, []

    def apply_(self, moments, settings, steps, last_steps):
        self.steps.append(steps)
        parts = zip(self.params, self.grads, moments, steps, settings, strict=True)
        for param, grad, (exp_avg, exp_avg_sq), step, setting in parts:
            adam_update_(param, grad, exp_avg, exp_avg_sq, step, setting)


def test_a_row_update_moves_its_parameters_in_place_of_their_gradients():
    ours, own, theirs = parameter(5, 3), parameter(5, 3), parameter(5, 3)
    optimizer = SparseAdam([{"params": [ours], "row_dim": 0, "lr": 0.02}, {"params": [own], "row_dim": 0}], lr=0.01)
    reference = SparseAdam([{"params": [theirs], "row_dim": 0, "lr": 0.02}])
    for n_steps, grad in enumerate(gaussian(1, 4, 5, 3), 1):
        update = DenseUpdate([ours], [grad])
        optimizer.row_updates.append(update)
        ours.grad, own.grad = torch.full_like(ours, 1e6), grad.clone()  # what is in grad has no say
        optimizer.step()
        optimizer.zero_grad()
        take_steps(reference, theirs, [grad])
        assert update.steps == [[float(n_steps)]]
        assert optimizer.row_updates == []
    for one, other in zip(bits(optimizer, ours), bits(reference, theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    assert optimizer.state[own]["step"] == 4
    assert copy.deepcopy(optimizer).row_updates == []


def test_a_row_update_is_refused_where_it_does_not_fit_before_anything_moves():
    param, other = parameter(5, 3), parameter(5, 3)
    optimizer = SparseAdam([param], row_dim=0, bias_correction="per_row")
    for params, message in (
        ([param], "bias_correction='per_row' is not served by row_updates: set bias_correction='global'"),
        ([other], r"\(5, 3\) in row_updates is no parameter"),
        ([param, param], r"\(5, 3\) is in two of row_updates"),
    ):
        optimizer.row_updates = [DenseUpdate(params, [gaussian(1, 5, 3)])]
        if len(params) > 1:
            optimizer.param_groups[0]["bias_correction"] = "global"
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert not optimizer.state


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("size", [1.0, 1e-8, 1e-12])
def test_with_eps_where_torch_sparse_adam_adds_it_the_two_are_equal_for_gradients_of_any_size(size):
    ours, theirs = parameter(20, 3), parameter(20, 3)
    optimizer = SparseAdam([ours], lr=0.01, eps_placement="sparse_adam")
    reference = torch.optim.SparseAdam([theirs], lr=0.01)
    grads = [as_sparse(size * grad) for grad in rows_active(1, 30, 20, 3)]
    take_steps(optimizer, ours, grads)
    take_steps(reference, theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_eps_where_adam_adds_it_moves_tiny_gradients_further():
    """After one step the root of the second moment is 0.032 of the gradient: eps counts 32 times as much there."""
    moved = {}
    for placement in ("adam", "sparse_adam"):
        param = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        take_steps(
            SparseAdam([param], lr=1.0, eps_placement=placement, row_dim=0), param, [1e-8 * torch.ones_like(param)]
        )
        moved[placement] = -param.item()
    assert moved == pytest.approx({"adam": 0.5, "sparse_adam": 1 / (1 + 1 / 0.001**0.5)}, rel=1e-6)


def due(optimizer, param, row_dim):
    """Both moments as they would be without laziness: what silent rows have not yet lost is taken from them."""
    state, (group,) = optimizer.state[param], optimizer.param_groups
    silent = int(state["step"]) - state["last_step"].double()
    by_row = [state[key].movedim(row_dim, 0) for key in ("exp_avg", "exp_avg_sq")]
    return [m * (beta**silent)[:, None] for m, beta in zip(by_row, group["betas"], strict=True)]


@pytest.mark.usefixtures("both_ways")
@both_corrections
@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize("betas", [(0.8, 0.9), (0.0, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_moments_of_silent_rows_decay_as_if_in_every_step(bias_correction, row_dim, betas, share):
    start, grads = gaussian(0, 7, 3), rows_active(1, 40, 7, 3, share=share)
    options = {"lr": 0.01, "betas": betas, "eps": 1e-3, "bias_correction": bias_correction}
    expected = row_adam(start, list(grads), **options, decays=[True] * 40)
    param = nn.Parameter(start.movedim(0, row_dim).contiguous())
    optimizer = SparseAdam([param], row_dim=row_dim, silent_moments="decay", **options)
    take_steps(optimizer, param, grads.movedim(1, 1 + row_dim))
    found = [param.detach().movedim(row_dim, 0), *due(optimizer, param, row_dim)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    kept = row_adam(start, list(grads), **options)
    assert share == 1.0 or not torch.allclose(expected[0], kept[0], rtol=1e-3)  # and it does make a difference


@both_corrections
@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_decay_can_be_switched_in_a_run(bias_correction, row_dim, first):
    """On: silence counts from there. Off: what is due is made good at once. And back again."""
    start, grads = gaussian(0, 7, 3), rows_active(1, 45, 7, 3, share=0.2)
    decays = [first] * 15 + [not first] * 15 + [first] * 15
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "bias_correction": bias_correction}
    expected = row_adam(start, list(grads), **options, decays=decays)
    param = nn.Parameter(start.movedim(0, row_dim).contiguous())
    optimizer = SparseAdam([param], row_dim=row_dim, **options)
    for grad, decay in zip(grads.movedim(1, 1 + row_dim), decays, strict=True):
        optimizer.param_groups[0]["silent_moments"] = "decay" if decay else "keep"
        take_steps(optimizer, param, [grad])
        assert ("last_step" in optimizer.state[param]) == decay
    torch.testing.assert_close(param.detach().movedim(row_dim, 0), expected[0], rtol=1e-12, atol=1e-12)


def test_a_step_with_decay_touches_what_fires_alone():
    param = parameter(6, 3)
    optimizer = SparseAdam([param], row_dim=0, silent_moments="decay")
    take_steps(optimizer, param, order_one(1, 3, 6, 3))
    before = {key: value.clone() for key, value in optimizer.state[param].items()}
    grad = torch.zeros(6, 3, dtype=torch.float64)
    grad[2] = 1.0
    take_steps(optimizer, param, [grad] * 5)
    silent = [0, 1, 3, 4, 5]
    for key in ("exp_avg", "exp_avg_sq", "last_step"):
        assert torch.equal(optimizer.state[param][key][silent], before[key][silent])
    assert optimizer.state[param]["last_step"].tolist() == [3, 3, 8, 3, 3, 3]


def test_dense_parameters_know_no_silence():
    ours, theirs = parameter(6, 3), parameter(6, 3)
    optimizer, reference = SparseAdam([ours], silent_moments="decay"), SparseAdam([theirs])
    for one, param in ((optimizer, ours), (reference, theirs)):
        take_steps(one, param, rows_active(1, 20, 6, 3))
    assert_same_bits(bits(optimizer, ours), bits(reference, theirs))


def test_a_gradient_of_every_entry_finds_moments_that_have_decayed():
    """Sparse gradients, which name rows, and then whole ones of a parameter without row_dim."""
    start, grads = gaussian(0, 7, 3), rows_active(1, 21, 7, 3, share=0.2)
    grads[-1] = order_one(2, 7, 3)
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "bias_correction": "global"}
    expected = row_adam(start, list(grads), **options, decays=[True] * 21)
    param = nn.Parameter(start.clone())
    optimizer = SparseAdam([param], silent_moments="decay", **options)
    take_steps(optimizer, param, [*(as_sparse(grad) for grad in grads[:-1]), grads[-1]])
    torch.testing.assert_close(param.detach(), expected[0], rtol=1e-12, atol=1e-12)


def test_a_state_from_before_there_was_a_choice_is_read_as_it_was_meant():
    param = parameter(3, 2)
    optimizer = SparseAdam([param], row_dim=0)
    take_steps(optimizer, param, order_one(1, 2, 3, 2))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["eps_placement"], group["silent_moments"]
    resumed = SparseAdam([param], row_dim=0, silent_moments="decay")
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["silent_moments"] == "keep"
    take_steps(resumed, param, order_one(2, 2, 3, 2))


@pytest.mark.parametrize("option", [{"eps_placement": "sparse_adam"}, {"bias_correction": "per_row"}])
def test_a_row_update_is_refused_with_options_that_it_does_not_serve(option):
    param = parameter(5, 3)
    optimizer = SparseAdam([param], row_dim=0, **option)
    optimizer.row_updates = [DenseUpdate([param], [gaussian(1, 5, 3)])]
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}='{option[name]}' is not served by row_updates"):
        optimizer.step()


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([12], r"there is no row 12; rows must lie in 0 to 9"),
        ([-1, 3], r"there is no row -1; rows must lie in 0 to 9"),
        ([3, 1], r"row 3 comes before 1; sort the rows"),
        ([1, 3, 3], r"row 3 comes before 3; .*add up those that repeat"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_anything_moves(rows, problem, row_dim):
    """Compiled loops see memory without bounds: such rows ended the process."""
    param = nn.Parameter(torch.zeros(10, 4).movedim(0, row_dim))
    optimizer = SparseAdam([param], row_dim=row_dim)
    optimizer.row_gradients[param] = RowGradient(torch.tensor(rows), torch.ones(len(rows), 4))
    shape = r"\(10, 4\)" if row_dim == 0 else r"\(4, 10\)"
    with pytest.raises(ValueError, match=rf"parameter of shape {shape}, rows along dimension {row_dim}: {problem}"):
        optimizer.step()
    assert not optimizer.state
    assert not param.any()


@pytest.mark.usefixtures("both_ways")
def test_a_row_gradient_of_another_dtype_or_shape_is_refused():
    param = nn.Parameter(torch.zeros(10, 4))
    optimizer = SparseAdam([param], row_dim=0)
    for gradient, problem in (
        (RowGradient(torch.tensor([1, 2], dtype=torch.int32), torch.ones(2, 4)), r"rows are torch.int32 \(2,\)"),
        (RowGradient(torch.tensor([1, 2]), torch.ones(4, 2)), r"values are \(4, 2\); they must be \(2, 4\)"),
    ):
        optimizer.row_gradients[param] = gradient
        with pytest.raises(ValueError, match=problem):
            optimizer.step()


def test_a_sparse_gradient_that_only_says_it_is_coalesced_is_refused():
    param = parameter(4, 2)
    values = order_one(1, 2, 2)
    param.grad = torch.sparse_coo_tensor(
        torch.tensor([[2, 2]]), values, (4, 2), is_coalesced=True, check_invariants=False
    )
    with pytest.raises(ValueError, match="row 2 comes before 2"):
        SparseAdam([param]).step()


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_step_leaves_the_gradient_as_it_is(share):
    """A second step with the same gradient divides once, as the first did."""
    param, twin = nn.Parameter(torch.ones(50, 4)), nn.Parameter(torch.ones(50, 4))
    rows, values = torch.arange(int(50 * share)), torch.rand(int(50 * share), 4)
    optimizer, reference = SparseAdam([param], row_dim=0), SparseAdam([twin], row_dim=0)
    optimizer.row_gradients[param] = RowGradient(rows, values, torch.tensor(2.0))
    reference.row_gradients[twin] = RowGradient(rows, values / 2)
    before = values.clone()
    for _ in range(3):
        optimizer.step()
        reference.step()
    assert torch.equal(values, before)
    torch.testing.assert_close(param, twin, rtol=1e-7, atol=0)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("row_dim", [None, 0, 1])
def test_a_step_between_forward_and_backward_is_noticed(row_dim):
    """Or the gradient would be that of weights which are no more."""
    param = nn.Parameter(torch.rand(6, 5))
    optimizer = SparseAdam([param], row_dim=row_dim)
    (param * param).sum().backward()
    optimizer.step()
    norms = param.detach().norm(dim=1)
    state = optimizer.state[param]
    tensors = [param, state["exp_avg"], state["exp_avg_sq"], *([norms] if row_dim == 0 else [])]
    optimizer.row_norms = {param: norms} if row_dim == 0 else {}
    versions, loss = [tensor._version for tensor in tensors], (param * param).sum()
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))
    assert optimizer.moved_versions == {param: param._version}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
