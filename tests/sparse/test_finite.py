"""What is not finite is found where it is, and nothing else is, without a copy and without a look at an accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from saelens_asi.sparse import finite as module
from saelens_asi.sparse.finite import FiniteFlag, all_finite, finite_rows, without_bad_rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BAD = (torch.nan, torch.inf, -torch.inf)


class _LargestOutput(TorchDispatchMode):
    """Numbers in the largest tensor that an operation allocates; views allocate nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
            self.n = max(self.n, out.numel())
        return out


@pytest.fixture
def on_cuda() -> Iterator[FakeTensorMode]:
    """Tensors with a device of type cuda; reading a number of theirs, or a shape that depends on numbers, raises."""
    with FakeTensorMode() as mode:
        yield mode


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    n_rows=st.integers(0, 9),
    width=st.sampled_from([1, 3, 64, 577]),
    planted=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 576), st.sampled_from(BAD)), max_size=4),
    size=st.sampled_from(["ordinary", "largest", "mixed"]),
    transposed=st.booleans(),
)
def test_rows_are_good_where_all_their_numbers_are_finite(dtype, n_rows, width, planted, size, transposed):
    x = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    if size == "largest":
        x.fill_(torch.finfo(dtype).max)  # whose sum, and the sum of whose squares, no dtype holds
    elif size == "mixed":
        x[::2] = x[::2].sign() * torch.finfo(dtype).max
    for row, column, bad in planted:
        if row < n_rows:
            x[row, column % width] = bad
    x = x.t().contiguous().t() if transposed else x
    assert torch.equal(finite_rows(x), x.isfinite().all(dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_looked_at_without_a_copy(dtype):
    x = torch.randn(50, 40).to(dtype)
    x[3, 5] = torch.nan
    with _LargestOutput() as largest:
        good = finite_rows(x)
    assert good.tolist() == [i != 3 for i in range(50)]
    assert largest.n <= 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_on_an_accelerator_are_told_without_reading_one(on_cuda, dtype):
    good = finite_rows(torch.empty(6, 5, device="cuda", dtype=dtype))
    assert (good.shape, good.dtype, good.device.type) == ((6,), torch.bool, "cuda")


def test_a_batch_of_good_rows_is_the_batch_itself():
    x = torch.randn(6, 5)
    assert without_bad_rows(x, finite_rows(x)) is x


def test_bad_rows_are_left_out():
    x = torch.randn(6, 5)
    x[0, 1], x[4, 0] = torch.nan, torch.inf
    left = without_bad_rows(x, finite_rows(x))
    assert torch.equal(left, x[[1, 2, 3, 5]])
    x[:] = torch.nan
    assert without_bad_rows(x, finite_rows(x)).shape == (0, 5)


@pytest.mark.parametrize(
    ("bad", "index"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        ([0, 3], [1, 1, 2, 2, 4, 5]),
        ([0, 1, 3, 5], [2, 4, 2, 2, 4, 4]),
        ([0, 1, 2, 4, 5], [3, 3, 3, 3, 3, 3]),
    ],
)
def test_the_bad_rows_of_an_accelerator_are_replaced_by_good_ones_in_turn(bad, index):
    x = torch.randn(6, 5)
    x[bad] = torch.nan
    assert torch.equal(module._with_bad_rows_replaced(x, finite_rows(x)), x[index])


def test_a_batch_without_a_good_row_is_zeros_on_an_accelerator():
    x = torch.full((6, 5), torch.inf)
    assert torch.equal(module._with_bad_rows_replaced(x, finite_rows(x)), torch.zeros(6, 5))
    assert module._with_bad_rows_replaced(x[:0], finite_rows(x[:0])).shape == (0, 5)


def test_bad_rows_on_an_accelerator_are_replaced_without_reading_which(on_cuda):
    x = torch.empty(6, 5, device="cuda", dtype=torch.bfloat16)
    replaced = without_bad_rows(x, finite_rows(x))
    assert (replaced.shape, replaced.dtype, replaced.device.type) == ((6, 5), torch.bfloat16, "cuda")


def _weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Row-major, column-major, a vector, a counter, and nothing."""
    tensors = [torch.randn(30, 7), torch.randn(7, 30).t(), torch.randn(30), torch.tensor(3.0), torch.empty(0, 7)]
    return [*(tensor.to(dtype) for tensor in tensors), torch.arange(4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", range(4))
def test_one_number_that_is_not_finite_is_found_in_any_layout(dtype, bad, which):
    tensors = _weights(dtype)
    assert all_finite(tensors)
    for tensor in tensors[:4]:
        tensor.fill_(torch.finfo(dtype).max)
    assert all_finite(iter(tensors))  # sums overflow, numbers do not
    tensors[which][tuple(size // 2 for size in tensors[which].shape)] = bad
    assert not all_finite(tensors)


def test_nothing_is_finite_and_parameters_are_looked_at_without_a_graph():
    assert all_finite([])
    found = all_finite([torch.nn.Parameter(torch.randn(3, 4))])
    assert (found.shape, found.dtype, found.requires_grad) == ((), torch.bool, False)


@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.t()])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_weights_are_looked_at_without_a_copy(layout, dtype, value):
    weights = layout(torch.full((40, 30), value, dtype=dtype))
    with _LargestOutput() as largest:
        all_finite([weights])
    assert largest.n <= 2  # answers, put together


def test_weights_on_an_accelerator_are_told_without_reading_one(on_cuda):
    found = all_finite([torch.empty(8, 5, device="cuda"), torch.empty(5, 8, device="cuda").t()])
    assert (found.shape, found.dtype, found.device.type) == ((), torch.bool, "cuda")


@pytest.mark.parametrize("counter_first", [True, False])
def test_the_answer_lies_on_the_accelerator_also_with_a_counter_on_the_cpu(counter_first):
    tensors = [torch.zeros(()), torch.empty(8, 5, device="meta")]  # as torch's Adam has them
    assert all_finite(tensors if counter_first else tensors[::-1]).device.type == "meta"


def test_the_flag_is_raised_by_one_loss_and_stays_so():
    flag = FiniteFlag()
    assert flag.read() == (True, 0)
    good = torch.tensor([True, False, True])
    flag.update_(torch.tensor(1.5), good)
    assert flag.read() == (True, 1)
    flag.update_(torch.tensor(torch.inf), ~good)
    flag.update_(torch.tensor(1.5, dtype=torch.bfloat16), good)
    assert flag.read() == (False, 4)
    assert flag.read() == (False, 4)


def test_a_loss_with_a_graph_leaves_no_graph_behind():
    flag, weight = FiniteFlag(), torch.ones((), requires_grad=True)
    flag.update_(weight * torch.nan, torch.ones(3, dtype=torch.bool))
    assert flag.read() == (False, 0)


def test_the_flag_lies_on_the_accelerator_until_it_is_read(on_cuda):
    flag = FiniteFlag()
    for _ in range(2):
        flag.update_(torch.empty((), device="cuda"), torch.empty(6, device="cuda", dtype=torch.bool))
    with pytest.raises(Exception, match=r"_local_scalar_dense|data-dependent|item"):
        flag.read()
