"""Sparse activations, gradients that exist for some rows only, and the memory that steps share."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from saelens_asi.sparse import kernels
from saelens_asi.sparse.kernels import kernels_take


class Workspace:
    """Buffers by name. A buffer is valid until the same name is taken again; its content is not initialised."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(
        self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
    ) -> Shaped[Tensor, " ..."]:
        """A contiguous tensor of ``shape`` on the device of ``like``, and of its dtype unless given."""
        key = (name, dtype or like.dtype, like.device)
        size = math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=key[1], device=like.device)
        return buffer[:size].view(*shape)

    def n_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())


class _OfThread(threading.local):
    """The workspace that a thread's trainers share, while one of them holds it."""

    workspace: weakref.ref[Workspace] | None = None


_of_thread = _OfThread()


def shared_workspace() -> Workspace:
    """The one workspace of this thread, for steps that follow one another: those of several SAEs need memory once.

    Its buffers are freed when nobody holds it any more. Nothing in it outlasts a step.
    """
    workspace = None if _of_thread.workspace is None else _of_thread.workspace()
    if workspace is None:
        workspace = Workspace()
        _of_thread.workspace = weakref.ref(workspace)
    return workspace


# Rows of a gradient made at once: a few MiB, which the allocator has at hand; larger ones it asks the system for.
_CHUNK_ROWS = 2048

# Rows that one thread adds up, where all are added to one.
_BAG_ROWS = 256


class RowGradient(NamedTuple):
    """The gradient of a parameter of which only some rows have one.

    Attributes:
        rows: ascending, without repetition.
        values: gradient of those rows; the row dimension comes first, wherever the parameter has it.
        divisor: number that ``values`` are yet to be divided by; None for 1.
    """

    rows: Int64[Tensor, " n_rows"]
    values: Float[Tensor, " n_rows *row"]
    divisor: Float[Tensor, ""] | None = None

    def to_dense(self, n_rows: int, row_dim: int = 0) -> Float[Tensor, " ..."]:
        """The gradient as autograd would have made it, zeros included."""
        values = self.values if self.divisor is None else self.values / self.divisor
        dense = values.new_zeros(n_rows, *values.shape[1:])
        return dense.index_copy_(0, self.rows, values).movedim(0, row_dim)

    def check(self, shape: Sequence[int], row_dim: int = 0) -> None:
        """Raise ValueError where this is no gradient of some rows of a parameter of ``shape``, with rows along row_dim.

        On a CPU also for rows that are not there, or not ascending; elsewhere looking would wait for the device.
        """
        rows, of = self.rows, f"row gradient of a parameter of shape {tuple(shape)}, rows along dimension {row_dim}"
        own = (*shape[:row_dim], *shape[row_dim + 1 :])
        if rows.dtype != torch.int64 or rows.ndim != 1:
            raise ValueError(f"{of}: rows are {rows.dtype} {tuple(rows.shape)}; give a vector of torch.int64")
        if self.values.shape != (rows.numel(), *own):
            raise ValueError(f"{of}: values are {tuple(self.values.shape)}; they must be {(rows.numel(), *own)}")
        if rows.device.type != "cpu" or rows.numel() == 0:
            return
        n = shape[row_dim]
        descents = (rows[1:] <= rows[:-1]).nonzero()
        if descents.numel() > 0:
            i = int(descents[0])
            order = f"row {int(rows[i])} comes before {int(rows[i + 1])}"
            raise ValueError(f"{of}: {order}; sort the rows, and add up those that repeat")
        for row in (int(rows[0]), int(rows[-1])):
            if not 0 <= row < n:
                raise ValueError(f"{of}: there is no row {row}; rows must lie in 0 to {n - 1}")


@dataclass(frozen=True)
class Activations:
    """A sparse (n_rows, d_sae) matrix in CSR form: which features are active in which row, and how much.

    Attributes:
        row_starts: entries row_starts[i] to row_starts[i + 1] belong to row i.
        features: of the entries.
        values: of the entries; may be empty where only products are asked for.
    """

    row_starts: Int64[Tensor, " n_rows_and_1"]
    features: Int64[Tensor, " n_entries"]
    values: Float[Tensor, " n_values"]

    @property
    def n_rows(self) -> int:
        return self.row_starts.numel() - 1

    def row_of_entry(self) -> Int64[Tensor, " n_entries"]:
        """The row of each entry."""
        counts = self.row_starts.diff()
        rows = torch.arange(self.n_rows, device=counts.device)
        return rows.repeat_interleave(counts, output_size=self.features.numel())

    def check(self, n_features: int) -> None:
        """Raise ValueError for features that are not in 0 to ``n_features`` - 1, or rows that are not all the entries.

        On a CPU; elsewhere looking would wait for the device.
        """
        starts, features, n_entries = self.row_starts, self.features, self.features.numel()
        if features.device.type != "cpu":
            return
        if starts[0] != 0 or starts[-1] != n_entries or (starts[1:] < starts[:-1]).any():
            raise ValueError(f"activations: row_starts must ascend from 0 to the number of entries, {n_entries}")
        if n_entries > 0:
            least, largest = (int(bound) for bound in features.aminmax())
            if least < 0 or largest >= n_features:
                raise ValueError(
                    f"activations: there is no feature {least if least < 0 else largest}; features must lie in 0 to "
                    f"{n_features - 1}, rows of the encoder and the decoder"
                )

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "n_rows d_in"]:
        """Each row's sum of ``values * W_dec[features]``."""
        return bag_sums(W_dec, self.features, self.row_starts, self.values)

    def products(
        self, left: Float[Tensor, "n_rows d_in"], W_dec: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, " n_entries"]:
        """Products of each entry's row of ``left`` with its feature's of ``W_dec``."""
        if self.features.numel() == 0:
            return self.values.new_zeros(0)
        if W_dec.device.type == "cpu" and W_dec.dtype in (torch.float32, torch.float64):
            self.check(W_dec.shape[0])  # the product reads memory without bounds
            return _sampled_product(self.row_starts, self.features, left, W_dec)
        wide = torch.promote_types(W_dec.dtype, torch.float32)
        parts = zip(torch.split(self.row_of_entry(), _CHUNK_ROWS), torch.split(self.features, _CHUNK_ROWS), strict=True)
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
        starts = features.new_zeros(max(0, int(features.max())) + 3)
        order, rows = torch.empty_like(features), torch.empty_like(features)
        kernels.sort_by_feature(features, self.row_starts.contiguous(), starts=starts, order=order, rows=rows)
        active = (starts[1:-1] > starts[:-2]).nonzero().squeeze(1)
        return FeatureOrder(active, functional.pad(starts[active], (0, 1), value=features.numel()), order, rows)


@dataclass(frozen=True)
class FeatureOrder:
    """The entries of ``Activations`` sorted by feature.

    Attributes:
        active: features that have an entry, ascending.
        starts: where the entries of each begin, and where all end.
        order: position of each entry in ``Activations``.
        rows: row of each entry.
    """

    active: Int64[Tensor, " n_active"]
    starts: Int64[Tensor, " n_active_and_1"]
    order: Int64[Tensor, " n_entries"]
    rows: Int64[Tensor, " n_entries"]

    def sums(self, weights: Float[Tensor, " n_entries"]) -> RowGradient:
        """For each active feature the sum of its entries of ``weights`` (in the order of Activations)."""
        totals = torch.zeros(self.active.numel(), dtype=weights.dtype, device=weights.device)
        owner = torch.arange(self.active.numel(), device=weights.device)
        owner = owner.repeat_interleave(self.starts.diff(), output_size=self.order.numel())
        return RowGradient(self.active, totals.index_add_(0, owner, weights[self.order]))

    def weighted_sums(
        self,
        weights: Float[Tensor, " n_entries"],
        source: Float[Tensor, "n_rows d_in"],
        name: str,
        workspace: Workspace,
    ) -> RowGradient:
        """For each active feature the sum of ``weights * source[row]`` over its entries.

        Args:
            weights: in the order of Activations.
            source: rows repeat when there are more of them in Activations (row i reads i modulo n_rows).
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
            out[first : first + _CHUNK_ROWS] = bag_sums(source, rows[lo:hi], starts, weights[lo:hi])
        return RowGradient(self.active, out)


def row_norms(table: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Euclidean norms of the rows, in float32 or wider; to the bits that SparseAdam keeps up to date."""
    if kernels_take(table):
        lengths = table.new_empty(table.shape[0])
        kernels.row_lengths(table, lengths)
        return lengths
    norms: Tensor = torch.linalg.vector_norm(table, dim=1, dtype=torch.promote_types(table.dtype, torch.float32))
    return norms


def update_row_norms_(
    norms: Float[Tensor, " n"], table: Float[Tensor, "n d"], rows: Int64[Tensor, " n_rows"], chunk: int = 2048
) -> None:
    """Renew the norms of some rows. Where most rows are meant, reading all in order is quicker than picking them."""
    if rows.numel() > table.shape[0] // 4:
        norms.copy_(row_norms(table))
        return
    for part in torch.split(rows, chunk):
        norms[part] = row_norms(table[part])


def weighted_row_sum(table: Float[Tensor, "n d"], weights: RowGradient) -> Float[Tensor, " d"]:
    """The sum of ``weights.values * table[weights.rows]``."""
    n = weights.rows.numel()
    starts = torch.arange(0, n + _BAG_ROWS, _BAG_ROWS, device=table.device).clamp(max=n)
    return bag_sums(table, weights.rows, starts, weights.values).sum(dim=0)


def total_norm(gradients: Iterable[Float[Tensor, " ..."]]) -> Float64[Tensor, ""]:
    """The Euclidean norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` takes it."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
    return total


def bag_sums(
    table: Float[Tensor, "n d"],
    indices: Int64[Tensor, " n_entries"],
    starts: Int64[Tensor, " n_bags_and_1"],
    weights: Float[Tensor, " n_entries"],
) -> Float[Tensor, "n_bags d"]:
    """In each bag the sum of ``weights * table[indices]``; bag i is entries starts[i] to starts[i + 1]."""
    return functional.embedding_bag(
        indices, table, starts, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )


def _sampled_product(
    row_starts: Int64[Tensor, " n_rows_and_1"],
    features: Int64[Tensor, " n_entries"],
    left: Float[Tensor, "n_rows d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, " n_entries"]:
    """``Activations.products`` by torch's sparse product, which reads both tables in place and copies no rows."""
    zeros, shape = left.new_zeros(features.numel()), (left.shape[0], W_dec.shape[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(row_starts, features, zeros, shape, check_invariants=False)
    products: Tensor = torch.sparse.sampled_addmm(pattern, left, W_dec.t(), beta=0.0).values()
    return products


class Entries(NamedTuple):
    """Active features, one by one: the token, the feature and its score of each."""

    tokens: Int64[Tensor, " n_entries"]
    features: Int64[Tensor, " n_entries"]
    scores: Float[Tensor, " n_entries"]

    def where(self, mask: Bool[Tensor, " n_entries"]) -> Entries:
        """Those for which ``mask`` is true."""
        if mask.all():
            return self
        return Entries(self.tokens[mask], self.features[mask], self.scores[mask])
