"""Numbers that are not finite: which rows of a batch hold one, whether weights do, and a flag that a run carries.

On an accelerator nothing here waits for it: results stay there until somebody reads them. On a CPU, where reading costs
nothing, sums are looked at first. They are the quickest pass over memory, and never finite where a number is not; where
one is not, because it has overflowed or for good reason, the numbers themselves are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from saelens_asi.sparse.operators import operator


@torch.no_grad()
def finite_rows(x: Float[Tensor, "batch d_in"]) -> Bool[Tensor, " batch"]:
    """Which rows hold finite numbers only, however large. One pass over x, and memory for a number a row."""
    if x.device.type != "cpu":
        return _largest_magnitude(x, dim=1).isfinite()
    good = x.sum(dim=1).isfinite()
    if not good.all():
        suspects = (~good).nonzero().squeeze(1)
        good[suspects] = _largest_magnitude(x[suspects], dim=1).isfinite()
    return good


def without_bad_rows(x: Float[Tensor, "batch d_in"], good: Bool[Tensor, " batch"]) -> Float[Tensor, "n_kept d_in"]:
    """The batch without the rows that are not ``good``.

    On a CPU these are left out: n_kept is the number of good rows, and x itself comes back where all are good.

    On an accelerator n_kept is the batch as it was, since a shape that depends on numbers would have to wait for them:
    the first bad row becomes a copy of the first good one, the second of the second, and so on in turn, so that no row
    counts much more than others. Without a good row the batch is zeros.

    Args:
        x: what the autoencoder is to read.
        good: as of ``finite_rows``.
    """
    if x.device.type == "cpu":
        return x if good.all() else x[good]
    return _with_bad_rows_replaced(x, good)


def _with_bad_rows_replaced(
    x: Float[Tensor, "batch d_in"], good: Bool[Tensor, " batch"]
) -> Float[Tensor, "batch d_in"]:
    positions = torch.arange(good.numel(), device=good.device)
    bad = good.logical_not()
    good_first = bad.sort(stable=True).indices
    turn = (bad.cumsum(0) - 1) % good.sum().clamp(min=1)
    kept = x.index_select(0, torch.where(good, positions, good_first.index_select(0, turn)))
    return kept.masked_fill_(bad.all(), 0)


@operator("(Tensor x) -> (Tensor, Tensor)", n_launches=lambda x: 2)
def keep_finite_rows(x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch d_in"], Bool[Tensor, " batch"]]:
    """For an accelerator: ``without_bad_rows`` of ``finite_rows``, and these. Two launches."""
    good = _largest_magnitude(x, dim=1).isfinite()
    return _with_bad_rows_replaced(x, good), good


@torch.no_grad()
def all_finite(tensors: Iterable[Shaped[Tensor, " ..."]]) -> Bool[Tensor, ""]:
    """Whether weights, moments and the like hold finite numbers only, however large and in whatever layout.

    The answer lies on the accelerator if one of the tensors does. Whole numbers are finite.
    """
    flags = [_is_finite(tensor) for tensor in tensors if tensor.is_floating_point() and tensor.numel() > 0]
    device = next((flag.device for flag in flags if flag.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([torch.ones((), dtype=torch.bool, device=device), *(flag.to(device) for flag in flags)]).all()


def _is_finite(tensor: Float[Tensor, " ..."]) -> Bool[Tensor, ""]:
    if tensor.device.type == "cpu" and (finite := tensor.sum().isfinite()):
        return finite
    return _largest_magnitude(tensor).isfinite()


def _largest_magnitude(x: Float[Tensor, " ..."], dim: int | None = None) -> Float[Tensor, " ..."]:
    """NaN where a number is NaN. The norm with no power in it: it overflows nowhere, and makes no copy."""
    largest: Tensor = torch.linalg.vector_norm(x, torch.inf, dim=dim)
    return largest


@operator("(Tensor(a!) counts, Tensor loss, Tensor good) -> ()", mutates=("counts",))
def note_(counts: Int64[Tensor, " 2"], loss: Float[Tensor, ""], good: Bool[Tensor, " batch"]) -> None:
    """Count a loss that is not finite, and rows that are not good. One launch."""
    counts += torch.stack([loss.isfinite().logical_not().long(), good.logical_not().sum()])


class FiniteFlag:
    """Whether all losses of a run so far were finite, and how many rows were left out: kept where the losses are."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    @torch.no_grad()
    def update_(self, loss: Float[Tensor, ""], good: Bool[Tensor, " batch"]) -> None:
        """Take in a step: its loss, and which rows of its batch were good. Nothing waits for the device."""
        if self._counts is None:
            self._counts = torch.zeros(2, dtype=torch.int64, device=loss.device)
        note_(self._counts, loss, good)

    def read(self) -> tuple[bool, int]:
        """Whether all were finite, and the number of bad rows, of all steps taken in. This waits for the device."""
        if self._counts is None:
            return True, 0
        n_losses, n_bad = self._counts.tolist()
        return n_losses == 0, n_bad
