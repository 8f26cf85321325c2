"""The update rule of Adam, for whole parameters and for some of their rows, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saelens_asi.sparse.kernels import kernels_take, run_kernel
from saelens_asi.sparse.rows import update_row_norms_

# Numbers of one tensor that are updated at once: with those of parameter, moments and gradient they stay in cache.
_CHUNK_ENTRIES = 2**20

# From this share of active rows on, a stretch of rows is updated where it lies and its silent rows are put back.
_IN_PLACE_SHARE = 0.75


class AdamSettings(NamedTuple):
    """Learning rate, decay rates of the two moments, what is added to the root of the second, and what divides the
    gradient first (a tensor, as of clipping); None for 1.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    grad_divisor: Tensor | None = None


def adam_update_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor | float, settings: AdamSettings
) -> None:
    """One Adam step in place (arXiv 1412.6980, algorithm 1). All tensors share a shape; ``step`` broadcasts to it.

    The moments are computed in their own dtype, which may be wider than the parameter's.
    """
    lr, beta1, beta2, eps, divisor = settings
    if not isinstance(step, Tensor) and _can_be_fused(param, grad, exp_avg, exp_avg_sq):
        torch._fused_adam_(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.tensor(step, dtype=torch.float32, device=param.device)],
            lr=float(lr),
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )
        return
    grad = grad.to(exp_avg.dtype) if divisor is None else grad.to(exp_avg.dtype) / divisor
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / _bias_correction(beta2, step)).sqrt_().add_(eps)
    update = (exp_avg / _bias_correction(beta1, step)).div_(denominator).mul_(lr)
    param.sub_(update.to(param.dtype))


def adam_update_rows_(
    tensors: Sequence[Tensor],
    rows: Tensor,
    grad: Tensor,
    step: Tensor | float,
    settings: AdamSettings,
    norms: Tensor | None = None,
) -> None:
    """``adam_update_`` of some rows; all others keep their bits.

    Args:
        tensors: parameter, first and second moment, each (n, ...); fastest where a row is contiguous.
        rows: (n_rows,) int64, ascending, without repetition.
        grad: (n_rows, ...) gradient of those rows.
        step: steps taken: a number, or (n_rows,).
        settings: of the update.
        norms: (n,) Euclidean norms of the rows of a parameter (n, d), of which those of ``rows`` are renewed.
    """
    if kernels_take(*tensors, grad, *([] if norms is None else [norms])):
        _update_compiled_(tensors, rows, grad, step, settings, norms)
        return
    _update_by_torch_(tensors, rows, grad, step, settings)
    if norms is not None:
        update_row_norms_(norms, tensors[0], rows)


def _update_by_torch_(
    tensors: Sequence[Tensor], rows: Tensor, grad: Tensor, step: Tensor | float, settings: AdamSettings
) -> None:
    n, row_size = tensors[0].shape[0], max(1, grad[:1].numel())
    chunk = max(1, _CHUNK_ENTRIES // row_size)
    if isinstance(step, Tensor):
        step = step.view(-1, *[1] * (grad.ndim - 1))
    if isinstance(step, Tensor) or rows.numel() < _IN_PLACE_SHARE * n or rows.device.type != "cpu":
        for lo in range(0, rows.numel(), chunk):
            part = slice(lo, lo + chunk)
            _update_gathered_(
                tensors, rows[part], grad[part], step[part] if isinstance(step, Tensor) else step, settings
            )
        return
    firsts = range(0, n, chunk)
    bounds = [*torch.searchsorted(rows, torch.tensor(firsts)).tolist(), rows.numel()]
    for first, lo, hi in zip(firsts, bounds, bounds[1:], strict=False):
        stretch = [tensor[first : first + chunk] for tensor in tensors]
        _update_stretch_(stretch, rows[lo:hi] - first, grad[lo:hi], step, settings)


def _update_compiled_(
    tensors: Sequence[Tensor],
    rows: Tensor,
    grad: Tensor,
    step: Tensor | float,
    settings: AdamSettings,
    norms: Tensor | None,
) -> None:
    """Every number of the rows is read and written once."""
    lr, beta1, beta2, eps, divisor = settings
    step_size = torch.as_tensor(lr / _bias_correction(beta1, step), dtype=grad.dtype)
    root_scale = torch.as_tensor(_bias_correction(beta2, step), dtype=grad.dtype).rsqrt()
    by_row = [tensor.view(tensor.shape[0], math.prod(tensor.shape[1:])) for tensor in (*tensors, grad)]
    corrections = [value.expand(rows.numel()).contiguous() for value in (step_size, root_scale)]
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, eps, 1.0 if divisor is None else 1 / float(divisor))
    norms = grad.new_empty(0) if norms is None else norms
    run_kernel("adam_rows", rows.numel(), *by_row[:3], rows, by_row[3], norms, *corrections, *numbers)


def _update_gathered_(
    tensors: Sequence[Tensor], rows: Tensor, grad: Tensor, step: Tensor | float, settings: AdamSettings
) -> None:
    param, exp_avg, exp_avg_sq = gathered = [tensor.index_select(0, rows) for tensor in tensors]
    adam_update_(param, grad, exp_avg, exp_avg_sq, step, settings)
    for tensor, values in zip(tensors, gathered, strict=True):
        tensor.index_copy_(0, rows, values)


def _update_stretch_(
    tensors: Sequence[Tensor], rows: Tensor, grad: Tensor, step: Tensor | float, settings: AdamSettings
) -> None:
    """Update all rows where they lie, and put back those that are not among ``rows``."""
    is_silent = torch.ones(tensors[0].shape[0], dtype=torch.bool).index_fill_(0, rows, False)
    silent = is_silent.nonzero().squeeze(1)
    kept = [tensor.index_select(0, silent) for tensor in tensors]
    if silent.numel() > 0:
        grad = torch.empty_like(tensors[0], dtype=grad.dtype).index_copy_(0, rows, grad)  # the rest is put back
    adam_update_(tensors[0], grad, tensors[1], tensors[2], step, settings)
    for tensor, values in zip(tensors, kept, strict=True):
        tensor.index_copy_(0, silent, values)


def _can_be_fused(*tensors: Tensor) -> bool:
    """Whether torch's fused kernel, which reads memory in order, takes these."""
    same_dtype = len({tensor.dtype for tensor in tensors}) == 1
    return same_dtype and tensors[0].device.type in ("cpu", "cuda") and all(t.is_contiguous() for t in tensors)


def _bias_correction(beta: float, step: Tensor | float) -> Tensor | float:
    """1 - beta^step, without the cancellation that costs a float32 ``step`` three digits where beta is near 1."""
    if isinstance(step, Tensor) and beta > 0:
        return -torch.expm1(step * math.log(beta))
    return 1 - beta**step
