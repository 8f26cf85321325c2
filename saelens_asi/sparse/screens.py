"""Exact TopK below the cost of the encoder's matrix product: bounds first, exact scores of the few that are left.

An ``Approximation`` of the encoder's rows gives every score for less than the product costs, and says by how much it
may be wrong: so each score has an upper bound. Features whose bound reaches what the k-th best score is likely to reach
are candidates; they are scored exactly, until no bound exceeds the k-th best of them. If that is lower than was thought
likely, the token is looked at again. So the selection is exact whatever the approximation, and the scores have the same
bits with each: which one is used is a matter of speed alone, and is found out by timing them, on tokens of the run
whose answers are kept.

- ``LowRank``: a score is split at the leading r directions V of the activations:
  ``x . w = (V'x) . (V'w) + x_rest . w_rest``. The first part costs r / d_in of the product, the second is at most
  ``|x_rest| |w_rest|``. With Active Subspace Initialization encoder rows start inside the leading directions (arXiv
  2508.16929, section on Active Subspace Initialization) and stay close to them.
- ``EightBit``: rows of encoder and activations are rounded to 8 bits after a rotation that evens out their coordinates:
  ``w = a q + e`` and ``x = c p + d`` with integers p and q. Then ``x . w = c a (p . q) + d . (a q) + x . e``: a product
  of integers and a rest that is at most ``|d| |a q| + |x| |e|``, about 1.5 % of ``|x| |w|``. It needs no structure in
  the activations. Why rotated: the largest coordinate sets the step of the codes, and a single large one, as residual
  streams have, would leave few codes to the others. A Hadamard matrix takes n log n additions and no multiplication.
- ``Whole``: the product itself, wrong by no more than rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float32, Int8, Int32, Int64, Shaped
from torch import Tensor

from saelens_asi.sparse import kernels
from saelens_asi.sparse.finite import finite_rows
from saelens_asi.sparse.kernels import Candidates, kernels_take
from saelens_asi.sparse.rows import Workspace, row_norms
from saelens_asi.sparse.selection import BatchSelection, batch_top_k, batch_width
from saelens_asi.sparse.shards import Shard
from saelens_asi.sparse.topk import Encoder, Query, TopK, encode_top_k

# Scores of a tile: 2,048 features and, for each thread, 1,024 tokens. What one pass writes the next finds in cache, and
# threads meet so seldom that others on the same cores do little harm.
_TILE_FEATURES, _TILE_TOKENS = 2048, 1024

# Room for candidates of a token, as a multiple of k. A token that has more is given to the whole product.
_ROOM = 64

# What an approximation misses is a product of vectors; were their directions random, it would be about 1 / sqrt(d_in)
# of its bound. A score is likely to be no lower than so many times that below what is known of it.
_DEVIATIONS = 6

# With fewer features than this for each of the k, nearly all are candidates.
_FEATURES_A_CHOICE = 32

# Parts of d_in that are tried as ranks, downwards until a lower one is slower.
_RANK_SHARES = (1 / 3, 7 / 24, 1 / 4, 5 / 24, 1 / 6, 1 / 8, 1 / 12)

# Share of the tokens of a step that each approximation is timed on, and steps until all are timed again: rows turn.
_SAMPLE_SHARE, _STEPS = 1 / 8, 40

# What lies outside a basis has a length that is the root of a difference of squares: an error of eps |w|^2 in float32
# becomes one of sqrt(eps) |w| = 3.5e-4 |w|. This share of |w| is added, and what the basis lacks to be orthonormal.
_SLACK = 3e-3

# An approximation is timed again before that when it leaves so many times the candidates that it left at first.
_MORE_CANDIDATES = 1.5

# From this d_in on, an eigendecomposition in float64 takes as long as steps do.
_MAX_WIDE = 1024

# BatchTopK looks first for scores above this share of the lowest that the last batch kept.
_FIRST_CUT = 0.8

# Of the rows one part in so many is compared in each step with what is kept of them.
_STRIPES = 32


class TokenTerms(NamedTuple):
    """Tokens as an approximation multiplies them, and the terms of each, see ``kernels.gather_candidates``."""

    factors: Shaped[Tensor, "n_tokens n_factors"]
    terms: Float32[Tensor, "3 n_tokens"]

    def part(self, tokens: slice) -> TokenTerms:
        return TokenTerms(self.factors[tokens], self.terms[:, tokens].contiguous())


@runtime_checkable
class Approximation(Protocol):
    """What is known of encoder rows, from which bounds of all scores follow; ``kernels.gather_candidates`` says how."""

    @property
    def terms(self) -> Float32[Tensor, "4 d_sae"]:
        """Of each feature."""

    @property
    def name(self) -> str:
        """For people."""

    def update_(self, encoder: Encoder, rows: Int64[Tensor, " n_rows"]) -> None:
        """Bring up to date what is known of rows that have changed."""

    def describes(self, encoder: Encoder, rows: slice) -> bool:
        """Whether some rows are known as they are now, up to what the bounds allow for."""

    def see(self, x: Float32[Tensor, "n_tokens d_in"]) -> TokenTerms:
        """What has to be known of tokens."""

    def multiply(
        self,
        encoder: Encoder,
        features: slice,
        factors: Shaped[Tensor, "n_tokens n_factors"],
        out: Shaped[Tensor, "n_tokens n_features"],
    ) -> None:
        """Approximate products of tokens with some features, up to the factors of the terms."""

    @property
    def product_dtype(self) -> torch.dtype:
        """Of ``multiply``'s output."""


@dataclass(frozen=True)
class Whole:
    """The encoder itself.

    Attributes:
        terms: scale, scaled bias, what rounding may do for each unit of a token's length, zero.
    """

    terms: Float32[Tensor, "4 d_sae"]
    name = "whole"
    product_dtype = torch.float32

    @classmethod
    def of(cls, encoder: Encoder) -> Whole:
        """Look at the rows' lengths."""
        made = cls(encoder.rows.new_zeros(4, len(encoder.rows)))
        _note_scale_and_bias_(made.terms, encoder)
        made.terms[2] = _slack(encoder.rows.shape[1]) * row_norms(encoder.rows) * _scale_of(encoder)
        return made

    def update_(self, encoder: Encoder, rows: Int64[Tensor, " n_rows"]) -> None:
        _note_scale_and_bias_(self.terms, encoder)
        lengths = row_norms(encoder.rows[rows])
        self.terms[2, rows] = _slack(encoder.rows.shape[1]) * lengths * _scale_of(encoder)[rows]

    def describes(self, encoder: Encoder, rows: slice) -> bool:
        # The slack has room for four times the length.
        return _same_terms(self.terms[:, rows], Whole.of(_some(encoder, rows)).terms, tolerance=0.1)

    def see(self, x: Float32[Tensor, "n_tokens d_in"]) -> TokenTerms:
        return TokenTerms(x, torch.stack([x.new_ones(len(x)), _lengths(x), x.new_zeros(len(x))]))

    def multiply(self, encoder: Encoder, features: slice, factors: Tensor, out: Tensor) -> None:
        torch.mm(factors, encoder.rows[features].t(), out=out)


@dataclass(frozen=True)
class LowRank:
    """Encoder rows seen from the leading directions of the activations.

    Attributes:
        basis: orthonormal.
        coordinates: of each row.
        terms: scale, scaled bias, scaled length of what lies outside the basis, what rounding may do.
        slack: share of a vector's length by which its part outside is made longer, see ``_SLACK``.
    """

    basis: Float32[Tensor, "d_in rank"]
    coordinates: Float32[Tensor, "d_sae rank"]
    terms: Float32[Tensor, "4 d_sae"]
    slack: float
    product_dtype = torch.float32

    @classmethod
    def of(cls, encoder: Encoder, basis: Float32[Tensor, "d_in rank"]) -> LowRank:
        """Project all rows on the columns of a basis."""
        rank = basis.shape[1]
        error = (basis.double().t() @ basis.double()).sub_(torch.eye(rank, dtype=torch.float64))
        slack = _SLACK + float(torch.linalg.matrix_norm(error, ord=2)) ** 0.5
        n = len(encoder.rows)
        made = cls(basis, encoder.rows.new_empty(n, rank), encoder.rows.new_empty(4, n), slack)
        made.update_(encoder, torch.arange(n))
        return made

    @property
    def name(self) -> str:
        return f"rank {self.basis.shape[1]}"

    def update_(self, encoder: Encoder, rows: Int64[Tensor, " n_rows"], chunk: int = 4096) -> None:
        scale = _scale_of(encoder)
        _note_scale_and_bias_(self.terms, encoder)
        for part in torch.split(rows, chunk):
            vectors = encoder.rows[part]
            coordinates = vectors @ self.basis
            outside, lengths = self._outside(vectors, coordinates)
            self.coordinates[part] = coordinates
            self.terms[2, part] = outside * scale[part]
            self.terms[3, part] = _slack(vectors.shape[1]) * lengths * scale[part]

    def describes(self, encoder: Encoder, rows: slice) -> bool:
        vectors, kept = encoder.rows[rows], self.terms[:, rows]
        coordinates = vectors @ self.basis
        outside, lengths = self._outside(vectors, coordinates)
        moved = _lengths(coordinates - self.coordinates[rows])
        now = torch.empty_like(kept)
        _note_scale_and_bias_(now, _some(encoder, rows))
        longer = (outside * now[0] - kept[2]).abs()
        within = (moved <= _slack(vectors.shape[1]) * lengths) & (longer <= _SLACK / 3 * lengths * now[0])
        return torch.equal(kept[:2], now[:2]) and bool(within.all())

    def see(self, x: Float32[Tensor, "n_tokens d_in"]) -> TokenTerms:
        coordinates = x @ self.basis
        return TokenTerms(coordinates, torch.stack([x.new_ones(len(x)), *self._outside(x, coordinates)]))

    def multiply(self, encoder: Encoder, features: slice, factors: Tensor, out: Tensor) -> None:
        torch.mm(factors, self.coordinates[features].t(), out=out)

    def _outside(
        self, vectors: Float32[Tensor, "n d_in"], coordinates: Float32[Tensor, "n rank"]
    ) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"]]:
        """Length of what lies outside the basis, with slack, and of the whole; without a product for the rest."""
        lengths = _lengths(vectors)
        outside = (lengths.square() - _lengths(coordinates).square()).clamp(min=0).sqrt()
        return outside + self.slack * lengths, lengths


@dataclass(frozen=True)
class EightBit:
    """Encoder rows in 8 bits, and what bounds need to know of each.

    Attributes:
        codes: of the rotated and scaled rows.
        terms: step of the codes, scaled bias, length of the coded row, length of what the codes miss.
    """

    codes: Int8[Tensor, "d_sae d_in"]
    terms: Float32[Tensor, "4 d_sae"]
    name = "8 bits"
    product_dtype = torch.int32

    @classmethod
    def of(cls, encoder: Encoder) -> EightBit:
        """Round all rows of an encoder that ``can_be_quantized``."""
        made = cls(torch.empty_like(encoder.rows, dtype=torch.int8), encoder.rows.new_empty(4, len(encoder.rows)))
        made.update_(encoder, torch.arange(len(encoder.rows)))
        return made

    def update_(self, encoder: Encoder, rows: Int64[Tensor, " n_rows"]) -> None:
        scale = _scale_of(encoder)
        step, bias, coded, missed = self.terms
        _quantize(encoder.rows, scale, rows, self.codes, step, coded, missed)
        torch.mul(encoder.bias, scale, out=bias)

    def describes(self, encoder: Encoder, rows: slice) -> bool:
        now = EightBit.of(_some(encoder, rows))
        return torch.equal(self.codes[rows], now.codes) and _same_terms(self.terms[:, rows], now.terms, tolerance=0)

    def see(self, x: Float32[Tensor, "n_tokens d_in"]) -> TokenTerms:
        codes, terms = torch.empty_like(x, dtype=torch.int8), x.new_empty(3, len(x))
        coded = x.new_empty(len(x))
        step, missed, whole = terms
        _quantize(x, x.new_ones(len(x)), torch.arange(len(x)), codes, step, coded, missed)
        torch.add(coded, missed, out=whole)  # at least the token's length, whatever rounding did
        return TokenTerms(codes, terms)

    def multiply(self, encoder: Encoder, features: slice, factors: Tensor, out: Tensor) -> None:
        _integer_product(factors, self.codes[features], out)


def can_be_quantized(encoder: Encoder) -> bool:
    """Whether bounds from 8-bit codes hold on this processor."""
    # torch._int_mm misreads the strides of a single column.
    return min(encoder.rows.shape) >= 2 and adds_in_32_bits(encoder.rows.shape[1])


@cache
def adds_in_32_bits(d_in: int) -> bool:
    """Whether this processor adds d_in products of 8-bit codes exactly, by computing the largest sums.

    Without VNNI, instructions add two products in 16 bits and saturate, where the library does not avoid them. And 32
    bits hold 133,144 products of the largest codes.
    """
    # All signs meet all signs: libraries move one factor to unsigned numbers, where only one sign is large.
    codes = torch.full((64, d_in), 127, dtype=torch.int8)
    codes[::2] = -127
    sums = torch.empty(64, 64, dtype=torch.int32)
    _integer_product(codes, codes, sums)
    return torch.equal(sums.double(), codes.double() @ codes.double().t())


def _integer_product(
    tokens: Int8[Tensor, "n_tokens d_in"],
    features: Int8[Tensor, "n_features d_in"],
    out: Int32[Tensor, "n_tokens n_features"],
) -> None:
    torch._int_mm(tokens, features.t(), out=out)


def _quantize(
    table: Float32[Tensor, "n d_in"],
    scale: Float32[Tensor, " n"],
    rows: Int64[Tensor, " n_rows"],
    codes: Int8[Tensor, "n d_in"],
    step: Float32[Tensor, " n"],
    coded: Float32[Tensor, " n"],
    missed: Float32[Tensor, " n"],
) -> None:
    kernels.quantize_rows(
        table,
        scale,
        rows,
        codes=codes,
        steps=step,
        coded_lengths=coded,
        residual_lengths=missed,
        slack=_slack(table.shape[1]),
    )


def _slack(n: int) -> float:
    """What rounding can do to a float32 sum of n products, relative to their lengths, with room.

    A sum of n products errs by at most about n eps / 2. 16 more roundings cover scaling and rotation (one for each
    power of two in d_in), and the whole is taken four times.
    """
    return 2 * (n + 16) * torch.finfo(torch.float32).eps


def _lengths(vectors: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return norms


def _scale_of(encoder: Encoder) -> Float[Tensor, " d_sae"]:
    return torch.ones_like(encoder.bias) if encoder.scale is None else encoder.scale


def _some(encoder: Encoder, rows: slice) -> Encoder:
    return encoder.among(torch.arange(len(encoder.rows))[rows])


def _note_scale_and_bias_(terms: Float32[Tensor, "4 d_sae"], encoder: Encoder) -> None:
    scale = _scale_of(encoder)
    terms[0] = scale
    torch.mul(encoder.bias, scale, out=terms[1])


def _same_terms(kept: Float32[Tensor, "4 n"], now: Float32[Tensor, "4 n"], tolerance: float) -> bool:
    """Whether scale and bias are the same, and lengths nearly."""
    return torch.equal(kept[:2], now[:2]) and bool(((kept[2:] - now[2:]).abs() <= tolerance * now[2:]).all())


def can_be_screened(encoder: Encoder, k: int) -> bool:
    """Whether bounds apply: to float32 on a CPU with compiled kernels, where k is a small part of the features."""
    fitting = encoder.matmul_dtype in (None, torch.float32) and encoder.rows.dtype == torch.float32
    scale = [] if encoder.scale is None else [encoder.scale]
    return fitting and len(encoder.rows) >= _FEATURES_A_CHOICE * k and kernels_take(encoder.rows, encoder.bias, *scale)


def screened_top_k(
    x: Float32[Tensor, "n_tokens d_in"],
    encoder: Encoder,
    k: int,
    approximation: Approximation,
    workspace: Workspace,
    above: float = 0.0,
) -> tuple[TopK, int]:
    """The k largest scores of each token, exactly, and how many scores that took.

    Args:
        x: contiguous.
        encoder: as the approximation describes it; one that ``can_be_screened``.
        k: features a token.
        approximation: of the encoder.
        workspace: holds tiles between calls.
        above: only scores (with ``magnitude`` their absolute values) above this number, at least 0, are wanted. Where a
            token has fewer than k, the rest of its scores are 0.

    Returns:
        Scores by feature, with the bits of ``Encoder``'s formula in the compiled order of its sums, whatever the
        approximation; of equal scores those with the lower index.
    """
    best, n_scored = _by_bounds(x, encoder, k, approximation, workspace, above)
    given_up = n_scored < 0
    if given_up.any():
        again = None if isinstance(approximation, Whole) else Whole.of(encoder)
        best.scores[given_up], best.indices[given_up] = _again(x[given_up], encoder, k, again, workspace, above)
    return best, int(n_scored.clamp(min=0).sum())


def _by_bounds(
    x: Float32[Tensor, "n_tokens d_in"],
    encoder: Encoder,
    k: int,
    approximation: Approximation,
    workspace: Workspace,
    above: float,
) -> tuple[TopK, Int64[Tensor, " n_tokens"]]:
    """What ``screened_top_k`` gives, and the number of exact scores of each token; -1 for one that is given up."""
    best = TopK(x.new_full((len(x), k), above), torch.full((len(x), k), -1))
    n_scored = torch.zeros(len(x), dtype=torch.int64)
    room = min(len(encoder.rows), _ROOM * k)
    n_tile = max(1, min(_TILE_TOKENS * torch.get_num_threads(), 2**22 // room))
    tokens = approximation.see(x)
    for first in range(0, len(x), n_tile):
        part = slice(first, min(len(x), first + n_tile))
        candidates = _no_candidates(part.stop - first, room, above, x.new_empty(0, k), workspace)
        _gather_(candidates, tokens.part(part), encoder, approximation, workspace)
        kernels.best_of_candidates(
            x[part],
            encoder.rows,
            encoder.bias,
            _scale_of(encoder),
            candidates,
            magnitude=encoder.magnitude,
            scores=best.scores[part],
            indices=best.indices[part],
            n_scored=n_scored[part],
        )
    missing = best.indices < 0
    best.scores[missing], best.indices[missing] = 0, 0
    n_scored[~_covered(x, tokens.terms, approximation.terms)] = -1
    return best, n_scored


def _no_candidates(n: int, room: int, above: float, like: Float32[Tensor, "0 k"], workspace: Workspace) -> Candidates:
    return Candidates(
        workspace.take("likely scores of the best", (n, like.shape[1]), like).fill_(above),
        workspace.take("cuts", (n,), like).fill_(above),
        workspace.take("number of candidates", (n,), like, torch.int64).zero_(),
        workspace.take("candidates", (n, room), like, torch.int32),
        workspace.take("upper bounds", (n, room), like),
        workspace.take("likely scores", (n, room), like),
    )


def _gather_(
    candidates: Candidates, tokens: TokenTerms, encoder: Encoder, approximation: Approximation, workspace: Workspace
) -> None:
    """Candidates among all features, which are looked through block by block."""
    d_sae, n_tokens = len(encoder.rows), len(tokens.factors)
    pad = _slack(1) * float(approximation.terms[1].abs().max())  # what rounding may do to the bias
    for first in range(0, d_sae, _TILE_FEATURES):
        features = slice(first, min(d_sae, first + _TILE_FEATURES))
        shape, dtype = (n_tokens, features.stop - first), approximation.product_dtype
        products = workspace.take("tile of bounds", shape, encoder.rows, dtype)
        approximation.multiply(encoder, features, tokens.factors, products)
        kernels.gather_candidates(
            products,
            tokens.terms,
            approximation.terms,
            candidates,
            first=first,
            magnitude=encoder.magnitude,
            pad=pad,
            doubt=min(1.0, _DEVIATIONS * encoder.rows.shape[1] ** -0.5),
        )


def _covered(
    x: Float32[Tensor, "n_tokens d_in"], tokens: Float32[Tensor, "3 n_tokens"], features: Float32[Tensor, "4 d_sae"]
) -> Bool[Tensor, " n_tokens"]:
    """Which tokens have bounds: those whose products are numbers, and so small that none overflows on the way."""
    largest = tokens.amax(dim=0) * features.abs().amax(dim=1).sum() + _lengths(x)
    return (largest * 1e6).isfinite()


def _again(
    x: Float32[Tensor, "n_tokens d_in"],
    encoder: Encoder,
    k: int,
    whole: Whole | None,
    workspace: Workspace,
    above: float,
) -> TopK:
    """For tokens that were given up: by the whole product, with exact scores where these can be had."""
    if whole is not None:
        return screened_top_k(x, encoder, k, whole, workspace, above)[0]
    return _by_product(x, encoder, k, workspace, above)  # ties by the hundred, or what is not a number


def _by_product(
    x: Float[Tensor, "n_tokens d_in"], encoder: Encoder, k: int, workspace: Workspace, above: float
) -> TopK:
    (best,) = encode_top_k(x, encoder, [Query(k)], workspace)
    ranked = best.scores.abs() if encoder.magnitude else best.scores
    return TopK(best.scores.masked_fill(ranked <= above, 0), best.indices)


class AdaptiveScreen:
    """The k best scores in each step of a run, by the approximation that is fastest on this machine for its data.

    Args:
        clock: seconds, for the timing.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.approximation: Approximation | None = None
        self._clock = clock
        self._steps_left = 0
        self._changed_share = 1.0
        self._scored_at_first: float | None = None
        self._seen: tuple[object, ...] | None = None
        self._stripe = 0
        self._last_threshold = 0.0

    def top_k(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        encoder: Encoder,
        k: int,
        workspace: Workspace,
        above: float = 0.0,
    ) -> TopK:
        """The k largest scores of each token, of those above ``above`` (at least 0); see ``screened_top_k``.

        What no approximation covers (another dtype, a device, few features) takes the whole product by torch's
        operations.
        """
        if not can_be_screened(encoder, k) or len(x) == 0:
            return _by_product(x, encoder, k, workspace, above)
        x = x.contiguous()
        self._catch_up(encoder)
        if self.approximation is None or self._steps_left <= 0:
            return self._choose(x, encoder, k, workspace, above)
        self._steps_left -= 1
        best, n_scored = screened_top_k(x, encoder, k, self.approximation, workspace, above)
        self._watch(n_scored / len(x))
        return best

    def batch_top_k(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        encoder: Encoder,
        n_entries: int,
        workspace: Workspace,
        shard: Shard,
        n_tokens: int,
    ) -> BatchSelection:
        """The largest positive scores of a whole batch, see ``selection.batch_top_k``.

        Scores far below what the last batch kept are not looked for, unless that turns out to be too few.

        Args:
            x: the tokens that this process sees: ``shard.part(n_tokens)`` of the batch.
            encoder: of the features that lie here.
            n_entries: to be kept of the batch.
            workspace: holds tiles between calls.
            shard: which features lie here.
            n_tokens: of the batch.
        """
        k = batch_width(n_entries, n_tokens, len(encoder.rows))
        above = _FIRST_CUT * self._last_threshold
        first = self.top_k(x, encoder, k, workspace, above)
        if above > 0 and shard.world.sum_((first.scores > 0).sum()) < n_entries:
            first = self._look_up(x, encoder, k, workspace)
        best = batch_top_k(
            first, n_entries, shard, n_tokens, lambda some, k: self._look_up(x[some], encoder, k, workspace)
        )
        lowest = 0.0 if best.lowest is None else float(best.lowest)
        self._last_threshold = lowest if 0 < lowest < float("inf") else 0.0
        return best

    def _look_up(self, x: Float[Tensor, "n_tokens d_in"], encoder: Encoder, k: int, workspace: Workspace) -> TopK:
        """A further question about tokens of a step: nothing is timed by it."""
        if self.approximation is None or not can_be_screened(encoder, k):
            return _by_product(x, encoder, k, workspace, above=0.0)
        return screened_top_k(x.contiguous(), encoder, k, self.approximation, workspace)[0]

    def rows_changed(self, encoder: Encoder, rows: Int64[Tensor, " n_rows"]) -> None:
        """To be called when the optimizer has moved some rows, and nobody has since."""
        self._changed_share = rows.numel() / encoder.rows.shape[0]
        if self.approximation is not None:
            self.approximation.update_(encoder, rows)
            self._seen = _versions(encoder)

    def knows(self, encoder: Encoder) -> bool:
        """Whether nobody has written to the encoder since this last looked, other than through ``.data``."""
        return self.approximation is None or self._seen == _versions(encoder)

    def invalidate(self) -> None:
        """Forget what is kept of the weights, after somebody has written to them through ``.data``."""
        self._seen = None

    def _catch_up(self, encoder: Encoder) -> None:
        """Look whether somebody else has written to the weights, and take it in.

        That shows in the versions of the tensors. What is written through ``.data`` shows in no version:
        ``invalidate`` is there to say it, and a part of the rows that moves on with each step, compared with what is
        kept of them, finds it within 32 steps otherwise.
        """
        if self.approximation is None:
            return
        size = -(-len(encoder.rows) // _STRIPES)
        rows = slice(self._stripe * size, min(len(encoder.rows), (self._stripe + 1) * size))
        self._stripe = (self._stripe + 1) % _STRIPES
        if self._seen != _versions(encoder) or not self.approximation.describes(encoder, rows):
            self.approximation.update_(encoder, torch.arange(len(encoder.rows)))
            self._seen = _versions(encoder)

    def _watch(self, scored: float) -> None:
        """Have all approximations timed again where this one leaves many more candidates than at first."""
        if self._scored_at_first is None:
            self._scored_at_first = scored
        elif scored > _MORE_CANDIDATES * self._scored_at_first:
            self._steps_left = 0

    def _choose(
        self, x: Float32[Tensor, "n_tokens d_in"], encoder: Encoder, k: int, workspace: Workspace, above: float
    ) -> TopK:
        """Time approximations on parts of the batch, one after the other, and keep the fastest; all answers count.

        Tokens that one gives up are looked at together in the end, and count here at the cost of the whole product.
        """
        size, first, found = max(1, round(len(x) * _SAMPLE_SHARE)), 0, []
        fastest, of_whole = float("inf"), 0.0
        for approximation, made_in in self._approximations(x, encoder):
            if first >= len(x):
                break
            seconds, given_up = [], 0.0
            for _ in range(2):  # the first time, memory is new
                start, part = self._clock(), x[first : first + (size + 1) // 2]
                found.append(_by_bounds(part, encoder, k, approximation, workspace, above))
                seconds.append((self._clock() - start) / max(1, len(part)))
                given_up += float((found[-1][1] < 0).sum()) / size
                first += len(part)
            cost = min(seconds) + given_up * of_whole + made_in * self._changed_share / len(x)
            of_whole = of_whole or cost  # the first
            if cost < fastest:
                self.approximation, fastest = approximation, cost
            elif isinstance(approximation, LowRank):
                break  # lower ranks are slower still
        self._steps_left, self._scored_at_first, self._seen = _STEPS, None, _versions(encoder)
        if self.approximation is not None and first < len(x):
            found.append(_by_bounds(x[first:], encoder, k, self.approximation, workspace, above))
        best = TopK(*(torch.cat([getattr(one, name) for one, _ in found]) for name in TopK._fields))
        left = torch.cat([n_scored for _, n_scored in found]) < 0
        if left.any():
            best.scores[left], best.indices[left] = _again(x[left], encoder, k, Whole.of(encoder), workspace, above)
        return best

    def _approximations(
        self, x: Float32[Tensor, "n_tokens d_in"], encoder: Encoder
    ) -> Iterator[tuple[Approximation, float]]:
        """All that hold here, and the seconds that it took to make each: a share of them is spent in each step."""
        self.approximation = None  # its memory is needed
        start = self._clock()
        yield Whole.of(encoder), self._clock() - start
        if can_be_quantized(encoder):
            start = self._clock()
            yield EightBit.of(encoder), self._clock() - start
        directions = leading_directions(x)
        d_in = encoder.rows.shape[1]
        for rank in sorted({max(8, round(share * d_in / 8) * 8) for share in _RANK_SHARES}, reverse=True):
            if rank < d_in:
                start = self._clock()
                yield LowRank.of(encoder, directions[:, :rank].contiguous()), self._clock() - start


def leading_directions(x: Float32[Tensor, "n_tokens d_in"]) -> Float32[Tensor, "d_in d_in"]:
    """Orthonormal directions in the order of the mean square of the activations along them; of finite tokens."""
    x = x[finite_rows(x)]
    second_moment = x.t() @ x
    if not second_moment.isfinite().all():
        return torch.eye(x.shape[1])
    wide = torch.float64 if len(second_moment) <= _MAX_WIDE else torch.float32
    directions: Tensor = torch.linalg.eigh(second_moment.to(wide)).eigenvectors.flip(1).to(x.dtype)
    return directions


def _versions(encoder: Encoder) -> tuple[object, ...]:
    """What tells a write to the weights, unless it went through ``.data``."""
    tensors = [encoder.rows, encoder.bias, *([] if encoder.scale is None else [encoder.scale])]
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
