"""The largest scores of each row, exactly: of a matrix, and of a product that is never held whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelens_asi.sparse.rows import Entries, Workspace

# Scores of one tile (256 MiB in float32) and features in it: large enough for the matrix product to run at full speed.
TILE_ENTRIES = 2**26
TILE_FEATURES = 2**15

# Columns of a group, and groups of a group: both passes shrink what is to be sorted, and a third would shrink little.
_GROUP_SIZES = (16, 8)

# Entries beyond the k largest that are looked at, to see whether the last of these has equals.
_SPARE = 4


class TopK(NamedTuple):
    """The k largest scores of each row, in no particular order, and their columns.

    Of equal scores those in the lower columns are among them: a tie falls the same way whatever computes it.
    """

    scores: Float[Tensor, "n_rows k"]
    indices: Int64[Tensor, "n_rows k"]


@dataclass(frozen=True)
class Encoder:
    """Scores of features, ``(x @ W_enc + b_enc) * scale``, of which only the largest are wanted.

    Attributes:
        rows: ``W_enc`` transposed: one row a feature.
        bias: of each feature.
        scale: factor of each feature (SAELens ranks by the norm of its decoder row); None for 1.
        magnitude: rank by absolute value; the scores keep their sign.
        matmul_dtype: dtype in which autocast multiplies; None for that of the rows.
    """

    rows: Float[Tensor, "d_sae d_in"]
    bias: Float[Tensor, " d_sae"]
    scale: Float[Tensor, " d_sae"] | None = None
    magnitude: bool = False
    matmul_dtype: torch.dtype | None = None

    def among(self, features: Int64[Tensor, " n_features"]) -> Encoder:
        """Some of the features as an encoder of their own."""
        scale = None if self.scale is None else self.scale[features]
        return replace(self, rows=self.rows[features], bias=self.bias[features], scale=scale)


@dataclass(frozen=True)
class Query:
    """How many features of which set: ``features`` is sorted, None for all; k is at most their number."""

    k: int
    features: Int64[Tensor, " n_features"] | None = None


def top_k(scores: Float[Tensor, "n_rows n_columns"], k: int, group_sizes: Sequence[int] = _GROUP_SIZES) -> TopK:
    """The k largest entries of each row, in about a third of the time that ``torch.topk`` takes.

    Args:
        scores: any numbers; what is not a number counts as the largest, as in ``torch.topk``.
        k: at most n_columns.
        group_sizes: columns in a group, for each level of nesting, see ``_largest``.
    """
    n_columns = scores.shape[1]
    values, columns = _largest(scores, min(n_columns, k + _SPARE), group_sizes)
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if 0 < k < columns.shape[1] < n_columns:
        tied = values[:, k - 1] == values[:, -1]  # what else is equal may lie in lower columns
        if tied.any():
            whole = scores[tied].sort(dim=1, descending=True, stable=True)
            values[tied, :k], columns[tied, :k] = whole.values[:, :k], whole.indices[:, :k]
    return TopK(values[:, :k], columns[:, :k])


def _largest(scores: Float[Tensor, "n_rows n_columns"], k: int, group_sizes: Sequence[int]) -> TopK:
    """The k largest entries; of equal ones any.

    They lie in the k groups of columns with the largest maxima. So the maxima are ranked first (by the same method),
    then the entries of k groups: one pass over the scores that only compares.
    """
    n_rows, n_columns = scores.shape
    if not group_sizes or n_columns < 4 * k * group_sizes[0]:
        return TopK(*scores.topk(k, dim=1, sorted=False))
    size = group_sizes[0]
    n_groups = n_columns // size
    # A group is every n_groups-th column, so that maxima are taken between rows of numbers, as vectors.
    grouped = scores[:, : n_groups * size].view(n_rows, size, n_groups)
    groups = _largest(grouped.amax(dim=1), k, group_sizes[1:]).indices
    members = grouped.gather(2, groups[:, None].expand(n_rows, size, k)).flatten(1)
    ungrouped = scores[:, n_groups * size :]
    values, positions = torch.cat([members, ungrouped], dim=1).topk(k, dim=1, sorted=False)
    columns = positions.div(k, rounding_mode="floor") * n_groups + groups.gather(1, positions % k)
    return TopK(values, torch.where(positions < k * size, columns, positions + (n_groups - k) * size))


def encode_top_k(
    x: Float[Tensor, "n_tokens d_in"], encoder: Encoder, queries: Sequence[Query], workspace: Workspace
) -> list[TopK]:
    """The largest scores of each token for every query, from one pass over the encoder.

    Scores exist a tile at a time: memory is that of ``TILE_ENTRIES`` numbers, whatever n_tokens x d_sae is.

    Args:
        x: what the encoder reads.
        encoder: the features.
        queries: what to look for.
        workspace: holds the tile between calls.

    Returns:
        For each query a TopK with features as indices; scores in float32 or wider.
    """
    d_sae = encoder.rows.shape[0]
    n_features = max(1, min(d_sae, TILE_FEATURES))
    tiles = torch.split(x, max(1, TILE_ENTRIES // n_features))
    results: list[list[TopK | None]] = [[None] * len(tiles) for _ in queries]
    for first in range(0, d_sae, n_features):
        block = _EncoderBlock(encoder, first, min(d_sae, first + n_features), workspace)
        subsets = [block.columns_of(query.features) for query in queries]
        for i, tile in enumerate(tiles):
            scores = block.scores(tile)
            for best, query, columns in zip(results, queries, subsets, strict=True):
                if columns is None or columns.numel() > 0:
                    here = _top_k_of_columns(scores, columns, query.k, encoder.magnitude)
                    here = TopK(here.scores, here.indices + first)
                    best[i] = _merge(best[i], here, query.k, encoder.magnitude)
    return [_concatenate(best, query.k, x) for best, query in zip(results, queries, strict=True)]


def encode_top_k_among(
    x: Float[Tensor, "n_tokens d_in"],
    encoder: Encoder,
    features: Int64[Tensor, " n_features"],
    k: int,
    workspace: Workspace,
) -> TopK:
    """The k largest scores of each token among few features: only their rows are multiplied."""
    (best,) = encode_top_k(x, encoder.among(features), [Query(k)], workspace)
    return TopK(best.scores, features[best.indices])


class _EncoderBlock:
    """Some consecutive features of an encoder, ready for products with many tiles of tokens."""

    def __init__(self, encoder: Encoder, first: int, stop: int, workspace: Workspace) -> None:
        self.first, self.stop = first, stop
        self.workspace = workspace
        self.scale = None if encoder.scale is None else encoder.scale[first:stop]
        rows, self.bias = encoder.rows[first:stop], encoder.bias[first:stop]
        self.matmul_dtype = encoder.matmul_dtype or rows.dtype
        # Bias and scale stay outside a product of low precision, as autocast has them, and as TF32 is on a GPU.
        self.fold = self.matmul_dtype.itemsize >= 4 and rows.device.type == "cpu"
        if not self.fold:
            self.weights = rows.to(self.matmul_dtype)
            return
        # Bias and scale go into the product: a column more costs less than two passes over the scores.
        n_features, d_in = rows.shape
        self.weights = workspace.take("encoder block", (n_features, d_in + 1), rows)
        self.weights[:, :d_in] = rows
        self.weights[:, d_in] = self.bias
        if self.scale is not None:
            self.weights *= self.scale[:, None]

    def columns_of(self, features: Int64[Tensor, " n_features"] | None) -> Int64[Tensor, " n_columns"] | None:
        """Those of the given sorted features that are in this block, by their columns; None for all."""
        if features is None:
            return None
        bounds = torch.tensor([self.first, self.stop], device=features.device)
        lo, hi = torch.searchsorted(features, bounds).tolist()
        return features[lo:hi] - self.first

    def scores(self, x: Float[Tensor, "n_tokens d_in"]) -> Float[Tensor, "n_tokens n_features"]:
        """Those of this tile of tokens, in memory that the next call overwrites."""
        shape = (x.shape[0], self.stop - self.first)
        tile = self.workspace.take("tile", shape, x, self.matmul_dtype)
        if self.fold:
            return torch.mm(torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1), self.weights.t(), out=tile)
        torch.mm(x.to(self.matmul_dtype), self.weights.t(), out=tile)
        if self.matmul_dtype.itemsize < 4:
            tile = self.workspace.take("wide tile", shape, x, torch.float32).copy_(tile)
        tile.add_(self.bias)
        return tile if self.scale is None else tile.mul_(self.scale)


def _top_k_of_columns(
    scores: Float[Tensor, "n_tokens n_features"], columns: Int64[Tensor, " n_columns"] | None, k: int, magnitude: bool
) -> TopK:
    if columns is not None:
        scores = scores.index_select(1, columns)
    k = min(k, scores.shape[1])
    best = top_k(scores.abs() if magnitude else scores, k)
    signed = scores.gather(1, best.indices) if magnitude else best.scores
    return TopK(signed, best.indices if columns is None else columns[best.indices])


def _merge(before: TopK | None, here: TopK, k: int, magnitude: bool) -> TopK:
    if before is None:
        return here
    both = TopK(torch.cat([before.scores, here.scores], 1), torch.cat([before.indices, here.indices], 1))
    if both.scores.shape[1] <= k:
        return both
    best = _top_k_of_columns(both.scores, None, k, magnitude)
    return TopK(best.scores, both.indices.gather(1, best.indices))


def _concatenate(tiles: Sequence[TopK | None], k: int, x: Float[Tensor, "n_tokens d_in"]) -> TopK:
    filled = [tile for tile in tiles if tile is not None]
    if x.shape[0] == 0 or not filled:
        return TopK(x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64))
    return TopK(torch.cat([tile.scores for tile in filled]), torch.cat([tile.indices for tile in filled]))


def entries_of(best: TopK) -> Entries:
    """The same, one by one, token after token."""
    n_tokens, k = best.indices.shape
    tokens = torch.arange(n_tokens, device=best.indices.device).repeat_interleave(k)
    return Entries(tokens, best.indices.flatten(), best.scores.flatten())


def ranked(scores: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Scores to be compared by: what is not a number comes first, as in ``topk``, and is kept."""
    return scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
