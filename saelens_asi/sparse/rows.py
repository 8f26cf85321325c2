"""Sparse activations, gradients that exist for some rows only, and the memory that steps share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from saelens_asi.sparse import kernels
from saelens_asi.sparse.kernels import kernels_take


class Workspace:
    """Buffers by name. A buffer is valid until the same name is taken again; its content is not initialised."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of ``shape`` on the device of ``like``, and of its dtype unless given."""
        key = (name, dtype or like.dtype, like.device)
        size = math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=key[1], device=like.device)
        return buffer[:size].view(*shape)


# Rows of a gradient made at once: a few MiB, which the allocator has at hand; larger ones it asks the system for.
_CHUNK_ROWS = 2048

# Rows that one thread adds up, where all are added to one.
_BAG_ROWS = 256


class RowGradient(NamedTuple):
    """The gradient of a parameter of which only some rows have one.

    Attributes:
        rows: (n_rows,) int64, ascending, without repetition.
        values: (n_rows, ...) gradient of those rows; the row dimension comes first, wherever the parameter has it.
        divisor: number (a tensor without dimensions) that ``values`` are yet to be divided by; None for 1.
    """

    rows: Tensor
    values: Tensor
    divisor: Tensor | None = None

    def to_dense(self, n_rows: int, row_dim: int = 0) -> Tensor:
        """The gradient as autograd would have made it, zeros included."""
        values = self.values if self.divisor is None else self.values / self.divisor
        dense = values.new_zeros(n_rows, *values.shape[1:])
        return dense.index_copy_(0, self.rows, values).movedim(0, row_dim)


@dataclass(frozen=True)
class Activations:
    """A sparse (n_rows, d_sae) matrix in CSR form: who is active where, and how much.

    Attributes:
        row_starts: (n_rows + 1,) int64: entries row_starts[i] to row_starts[i + 1] belong to row i.
        features: (n_entries,) int64.
        values: (n_entries,).
    """

    row_starts: Tensor
    features: Tensor
    values: Tensor

    @property
    def n_rows(self) -> int:
        return self.row_starts.numel() - 1

    def row_of_entry(self) -> Tensor:
        """(n_entries,) int64."""
        counts = self.row_starts.diff()
        rows = torch.arange(self.n_rows, device=counts.device)
        return rows.repeat_interleave(counts, output_size=self.features.numel())

    def decode(self, W_dec: Tensor) -> Tensor:
        """(n_rows, d_in): each row's sum of ``values * W_dec[features]``."""
        return _weighted_sums(W_dec, self.features, self.row_starts, self.values)

    def products(self, left: Tensor, W_dec: Tensor) -> Tensor:
        """(n_entries,): products of each entry's row of ``left`` (n_rows, d_in) with its feature's of ``W_dec``."""
        if self.features.numel() == 0:
            return self.values.new_zeros(0)
        if W_dec.device.type == "cpu" and W_dec.dtype in (torch.float32, torch.float64):
            return _sampled_product(self.row_starts, self.features, left, W_dec)
        wide = torch.promote_types(W_dec.dtype, torch.float32)
        parts = zip(self.row_of_entry().split(_CHUNK_ROWS), self.features.split(_CHUNK_ROWS), strict=True)
        return torch.cat(
            [torch.linalg.vecdot(left[rows].to(wide), W_dec[features].to(wide)) for rows, features in parts]
        )

    def by_feature(self) -> FeatureOrder:
        """The entries in the order of their features; entries of a feature keep theirs."""
        if self.features.numel() > 0 and kernels_take(self.values):
            return self._by_feature_compiled()
        features, order = torch.sort(self.features, stable=True)
        active, counts = torch.unique_consecutive(features, return_counts=True)
        starts = functional.pad(counts.cumsum(0), (1, 0))
        return FeatureOrder(active, starts, order, self.row_of_entry()[order])

    def _by_feature_compiled(self) -> FeatureOrder:
        features = self.features.contiguous()
        starts = features.new_zeros(int(features.max()) + 3)
        order, rows = torch.empty_like(features), torch.empty_like(features)
        kernels.sort_by_feature(features, self.row_starts.contiguous(), starts=starts, order=order, rows=rows)
        active = (starts[1:-1] > starts[:-2]).nonzero().squeeze(1)
        return FeatureOrder(active, functional.pad(starts[active], (0, 1), value=features.numel()), order, rows)


@dataclass(frozen=True)
class FeatureOrder:
    """The entries of ``Activations`` sorted by feature.

    Attributes:
        active: (n_active,) features that have an entry, ascending.
        starts: (n_active + 1,) where the entries of each begin.
        order: (n_entries,) position of each entry in ``Activations``.
        rows: (n_entries,) row of each entry.
    """

    active: Tensor
    starts: Tensor
    order: Tensor
    rows: Tensor

    def sums(self, weights: Tensor) -> RowGradient:
        """For each active feature the sum of its entries of ``weights`` (n_entries, in the order of Activations)."""
        totals = torch.zeros(self.active.numel(), dtype=weights.dtype, device=weights.device)
        owner = torch.arange(self.active.numel(), device=weights.device)
        owner = owner.repeat_interleave(self.starts.diff(), output_size=self.order.numel())
        return RowGradient(self.active, totals.index_add_(0, owner, weights[self.order]))

    def weighted_sums(self, weights: Tensor, source: Tensor, name: str, workspace: Workspace) -> RowGradient:
        """For each active feature the sum of ``weights * source[row]`` over its entries.

        Args:
            weights: (n_entries,) in the order of Activations.
            source: (n_rows, d_in); rows repeat when there are more of them in Activations (row i reads i modulo n).
            name: of the buffer in ``workspace`` that holds the result until the same name is asked for again.
            workspace: see ``name``.
        """
        weights, rows = weights[self.order].to(source.dtype), self.rows % max(1, source.shape[0])
        out = workspace.take(name, (self.active.numel(), source.shape[1]), source)
        bounds = self.starts[::_CHUNK_ROWS].tolist()
        if bounds[-1] != self.order.numel():
            bounds.append(self.order.numel())
        for i, (lo, hi) in enumerate(pairwise(bounds)):
            first = i * _CHUNK_ROWS
            starts = self.starts[first : first + _CHUNK_ROWS + 1] - lo
            out[first : first + _CHUNK_ROWS] = _weighted_sums(source, rows[lo:hi], starts, weights[lo:hi])
        return RowGradient(self.active, out)


def row_norms(table: Tensor) -> Tensor:
    """(n,) Euclidean norms of the rows of (n, d), in float32 or wider; to the bits that SparseAdam keeps up to date."""
    if kernels_take(table):
        norms = table.new_empty(table.shape[0])
        kernels.row_lengths(table, norms)
        return norms
    return torch.linalg.vector_norm(table, dim=1, dtype=torch.promote_types(table.dtype, torch.float32))


def update_row_norms_(norms: Tensor, table: Tensor, rows: Tensor, chunk: int = 2048) -> None:
    """Renew the norms of some rows. Where most rows are meant, reading all in order is quicker than picking them."""
    if rows.numel() > table.shape[0] // 4:
        norms.copy_(row_norms(table))
        return
    for part in rows.split(chunk):
        norms[part] = row_norms(table[part])


def weighted_row_sum(table: Tensor, weights: RowGradient) -> Tensor:
    """(d,): the sum of ``weights.values * table[weights.rows]``, for a table (n, d)."""
    n = weights.rows.numel()
    starts = torch.arange(0, n + _BAG_ROWS, _BAG_ROWS, device=table.device).clamp(max=n)
    return _weighted_sums(table, weights.rows, starts, weights.values).sum(dim=0)


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` takes it; float64."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    return torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))


def _weighted_sums(table: Tensor, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """(n_bags, d): in each bag the sum of weights * table[indices], bags being starts[i] to starts[i + 1]."""
    return functional.embedding_bag(
        indices, table, starts, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )


def _sampled_product(row_starts: Tensor, features: Tensor, left: Tensor, W_dec: Tensor) -> Tensor:
    zeros, shape = left.new_zeros(features.numel()), (left.shape[0], W_dec.shape[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(row_starts, features, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, left, W_dec.t(), beta=0.0).values()


class Entries(NamedTuple):
    """Active features, one by one: int64 tokens and features, and their scores, each (n_entries,)."""

    tokens: Tensor
    features: Tensor
    scores: Tensor

    def where(self, mask: Tensor) -> Entries:
        if mask.all():
            return self
        return Entries(self.tokens[mask], self.features[mask], self.scores[mask])
