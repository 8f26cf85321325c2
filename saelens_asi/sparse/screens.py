"""Exact TopK below the cost of the encoder's matrix product: bounds first, exact scores of the few that are left.

**Projection.** A score is split at the leading r directions V of the activations:
``x . w = (V'x) . (V'w) + x_rest . w_rest``. The first part costs r / d_in of the product, the second is at most
``|x_rest| |w_rest|``. So every score has an upper bound; features whose bound reaches the k-th best of a few exact
scores are scored exactly, all others cannot be among the k best. With Active Subspace Initialization encoder rows start
inside the leading directions (arXiv 2508.16929, section on Active Subspace Initialization) and stay close to them, so
that few features are left in question.

**8-bit integers**, for processors that multiply them faster than floating-point numbers. Rows of encoder and
activations are rounded to 8 bits after a rotation that evens out their coordinates: ``w = a q + e`` and ``x = c p + d``
with integers p and q. Then ``x . w = c a (p . q) + d . (a q) + x . e``: a product of integers and a rest that is at
most ``|d| |a q| + |x| |e|``, about 1.5 % of ``|x| |w|``. Exact scores are taken in the order of these bounds until no
bound exceeds the k-th best. It needs no structure in the activations. Why rotated: the largest coordinate sets the step
of the codes, and a single large one, as residual streams have, would leave few codes to the others. A Hadamard matrix
takes n log n additions and no multiplication.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int8, Int32, Int64
from torch import Tensor
from torch.nn import functional

from saelens_asi.sparse import kernels
from saelens_asi.sparse.kernels import kernels_take
from saelens_asi.sparse.rows import Activations, Workspace
from saelens_asi.sparse.topk import TILE_ENTRIES, Encoder, Query, TopK, encode_top_k, top_k

# Integer products of one tile (64 MiB), and tokens in it, from which on the integer product runs at full speed.
_TILE_ENTRIES, _TILE_TOKENS = 2**24, 512

# A token that needs exact scores of more than this share of the features is left to the whole product: a row scored by
# itself costs at least _SCORE_COST = 28 times its share of the product, so that at 1/28 nothing is won any more.
_MAX_SCORED_SHARE = 1 / 32

# Columns of a group whose largest bound stands for all of them. Larger groups leave fewer maxima to rank, and more
# features to look through in each group that reaches the threshold.
_GROUP = 16

# Features with the largest bounds that are scored first, as a multiple of k: their k-th best score is the threshold.
# With k alone it would be the worst of them; a larger multiple raises it little, at the price of more exact scores.
_FIRST = 2

# Costs in multiply-adds of a dense product, measured on x86: an exact score costs so many for each of its d_in (it
# reads a row from memory for one use, the product for many), and so many more to be found; comparing the bounds costs
# as much as so many directions of the product.
_SCORE_COST = 28
_FIND_COST = 30_000
_COMPARE_COST = 40

# The same for 8-bit scores: of a product in shares of the whole product, of comparing, and of rounding a number.
_INTEGER_PRODUCT, _INTEGER_COMPARE_COST, _ROUND_COST = 1 / 3, 50, 140

# Both residual lengths are made longer by this share of the whole length, since each is the root of a difference of
# squares: an error of eps |w|^2 in float32 becomes one of sqrt(eps) |w| = 3.5e-4 |w|, and sums of products err as well.
_SLACK = 3e-3

_SAMPLE_TOKENS, _SAMPLE_FEATURES = 128, 8192
_RANK_SHARES = (1 / 8, 3 / 16, 1 / 4, 1 / 3, 4 / 9, 5 / 9, 2 / 3)

# Steps after which the screen is chosen anew: with one, which ages as features turn, and without one, where choosing
# (an eigendecomposition, and bounds at each rank) is all that it costs.
_STEPS_WITH, _STEPS_WITHOUT = 25, 200


@runtime_checkable
class Screen(Protocol):
    """What is known of encoder rows, from which upper bounds of all scores follow for less than the product costs.

    A screen is made by the classmethod ``of`` of its class, from an encoder and what the class needs beside it.
    """

    def update_(self, encoder: Encoder, changed: Int64[Tensor, " n_changed"]) -> None:
        """Bring up to date what is known of the rows that have changed."""

    def describes(self, encoder: Encoder) -> bool:
        """Whether a sample of the rows is known as they are now."""

    def bounds(self, x: Float[Tensor, "n_tokens d_in"]) -> Float[Tensor, "n_tokens d_sae"]:
        """Numbers that no score exceeds."""

    def top_k(self, x: Float[Tensor, "n_tokens d_in"], encoder: Encoder, k: int, workspace: Workspace) -> TopK:
        """The k largest scores of each token, exactly.

        Args:
            x: what the encoder reads.
            encoder: as this screen was made from, or brought up to date with.
            k: features a token.
            workspace: see ``encode_top_k``.
        """


@dataclass(frozen=True)
class QuantizedScreen:
    """Encoder rows in 8 bits, and what bounds need to know of each.

    Attributes:
        codes: of the rotated and scaled rows.
        terms: step of the codes, scaled bias, length of the coded row, length of what the codes miss.
    """

    codes: Int8[Tensor, "d_sae d_in"]
    terms: Float32[Tensor, "4 d_sae"]

    @classmethod
    def of(cls, encoder: Encoder) -> QuantizedScreen:
        """Round all rows of an encoder that ``can_be_quantized``."""
        screen = cls(torch.empty_like(encoder.rows, dtype=torch.int8), encoder.rows.new_empty(4, len(encoder.rows)))
        screen.update_(encoder, torch.arange(len(encoder.rows)))
        return screen

    def update_(self, encoder: Encoder, changed: Int64[Tensor, " n_changed"]) -> None:
        """Round the rows that have changed."""
        scale = _scale_of(encoder)
        step, bias, coded, missed = self.terms
        _quantize(encoder.rows, scale, changed, self.codes, step, coded, missed)
        torch.mul(encoder.bias, scale, out=bias)
        bias.add_(bias.abs(), alpha=_slack(1))

    def describes(self, encoder: Encoder) -> bool:
        """Whether a sample of the rows is rounded as they are now."""
        sample = torch.arange(0, len(self.codes), max(1, len(self.codes) // 64))
        now = QuantizedScreen.of(encoder.among(sample))
        return torch.equal(self.codes[sample], now.codes) and torch.allclose(
            self.terms[:, sample], now.terms, rtol=1e-5
        )

    def bounds(self, x: Float32[Tensor, "n_tokens d_in"]) -> Float32[Tensor, "n_tokens d_sae"]:
        """Numbers that no score exceeds."""
        codes, tokens = _quantize_tokens(x)
        step, bias, coded, missed = self.terms
        sums = _integer_product(codes, self.codes)
        products: Tensor = tokens[0][:, None] * (step * sums)
        bounds: Tensor = products + bias + tokens[1][:, None] * coded + tokens[2][:, None] * missed
        return bounds

    def top_k(self, x: Float32[Tensor, "n_tokens d_in"], encoder: Encoder, k: int, workspace: Workspace) -> TopK:
        """See ``Screen``; tokens with too many candidates take the whole product."""
        d_sae = len(self.codes)
        best = TopK(x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64))
        x = x.contiguous()
        codes, tokens = _quantize_tokens(x)
        scale = _scale_of(encoder)
        n_tile = max(_TILE_TOKENS, _TILE_ENTRIES // d_sae)
        for first in range(0, len(x), n_tile):
            part = slice(first, first + n_tile)
            sums = workspace.take("integer tile", (len(x[part]), d_sae), x, torch.int32)
            _integer_product(codes[part], self.codes, out=sums)
            kernels.top_k_by_bounds(
                x[part],
                encoder.rows,
                encoder.bias,
                scale,
                tokens[:, part].contiguous(),
                self.terms,
                sums,
                max_scored=max(2 * k, int(d_sae * _MAX_SCORED_SHARE)),
                scores=best.scores[part],
                indices=best.indices[part],
            )
        # Given up, or not numbers: a bound that is NaN compares as neither larger nor smaller, and says nothing.
        failed = (best.indices[:, 0] < 0) | ~best.scores.isfinite().all(dim=1) | ~tokens.isfinite().all(dim=0)
        if not self.terms.isfinite().all():
            failed.fill_(True)
        if failed.any():
            (dense,) = encode_top_k(x[failed], encoder, [Query(k)], workspace)
            best.scores[failed], best.indices[failed] = dense
        return best


def can_be_quantized(encoder: Encoder) -> bool:
    """Whether bounds from 8-bit codes hold for the encoder on this processor."""
    rows = encoder.rows
    if min(rows.shape) < 2:  # torch._int_mm misreads the strides of a single column
        return False
    fitting = rows.dtype == torch.float32 and encoder.matmul_dtype in (None, torch.float32) and not encoder.magnitude
    return fitting and rows.is_contiguous() and kernels_take(rows) and adds_in_32_bits(rows.shape[1])


@cache
def adds_in_32_bits(d_in: int) -> bool:
    """Whether this processor adds d_in products of 8-bit codes exactly, by computing the largest sums.

    Without VNNI, instructions add two products in 16 bits and saturate, where the library does not avoid them. And 32
    bits hold 133,144 products of the largest codes.
    """
    # All signs meet all signs: libraries move one factor to unsigned numbers, where only one sign is large.
    codes = torch.full((64, d_in), 127, dtype=torch.int8)
    codes[::2] = -127
    return torch.equal(_integer_product(codes, codes).double(), codes.double() @ codes.double().t())


def multiplies_integers_fast() -> bool:
    """Whether this processor has instructions (VNNI) that make the 8-bit product as cheap as the costs above say."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


def _integer_product(
    tokens: Int8[Tensor, "n_tokens d_in"],
    features: Int8[Tensor, "n_features d_in"],
    out: Int32[Tensor, "n_tokens n_features"] | None = None,
) -> Int32[Tensor, "n_tokens n_features"]:
    return torch._int_mm(tokens, features.t()) if out is None else torch._int_mm(tokens, features.t(), out=out)


def _quantize_tokens(
    x: Float32[Tensor, "n_tokens d_in"],
) -> tuple[Int8[Tensor, "n_tokens d_in"], Float32[Tensor, "3 n_tokens"]]:
    """Codes, and their step, the length of what they miss, and the length of the token."""
    x = x.contiguous()
    codes, terms = torch.empty_like(x, dtype=torch.int8), x.new_empty(3, len(x))
    coded = x.new_empty(len(x))
    step, missed, whole = terms
    _quantize(x, x.new_ones(len(x)), torch.arange(len(x)), codes, step, coded, missed)
    torch.add(coded, missed, out=whole)  # at least the token's length, whatever rounding did
    return codes, terms


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


def _scale_of(encoder: Encoder) -> Float[Tensor, " d_sae"]:
    return torch.ones_like(encoder.bias) if encoder.scale is None else encoder.scale


@dataclass(frozen=True)
class ProjectionScreen:
    """Encoder rows seen from the leading directions of the activations.

    Attributes:
        basis: orthonormal.
        rows: coordinates of each scaled row, the length of its residual outside the basis, and its scaled bias.
    """

    basis: Float[Tensor, "d_in rank"]
    rows: Float[Tensor, "d_sae rank_and_2"]

    @classmethod
    def of(cls, encoder: Encoder, basis: Float[Tensor, "d_in rank"]) -> ProjectionScreen:
        """Project all rows of an encoder that ``can_be_screened``."""
        return cls(basis, _project(encoder, basis))

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def update_(self, encoder: Encoder, changed: Int64[Tensor, " n_changed"], chunk: int = 4096) -> None:
        """Project the rows that have changed."""
        for features in torch.split(changed, chunk):
            self.rows[features] = _project(encoder.among(features), self.basis)

    def describes(self, encoder: Encoder) -> bool:
        """Whether a sample of the rows is projected as they are now."""
        sample = torch.arange(0, len(self.rows), max(1, len(self.rows) // 64), device=self.rows.device)
        now = _project(encoder.among(sample), self.basis)
        return torch.allclose(self.rows[sample], now, rtol=1e-3, atol=1e-3 * float(now.abs().max()))

    def bounds(
        self, x: Float[Tensor, "n_tokens d_in"], out: Float[Tensor, "n_tokens d_sae"] | None = None
    ) -> Float[Tensor, "n_tokens d_sae"]:
        """Numbers that no score exceeds."""
        coordinates = x @ self.basis
        left = torch.cat([coordinates, _residual_lengths(x, coordinates), x.new_ones(len(x), 1)], dim=1)
        return torch.mm(left, self.rows.t(), out=out)

    def top_k(self, x: Float[Tensor, "n_tokens d_in"], encoder: Encoder, k: int, workspace: Workspace) -> TopK:
        """See ``Screen``; a tile with too many candidates takes the whole product."""
        d_sae = encoder.rows.shape[0]
        best = []
        for tile in torch.split(x, max(1, TILE_ENTRIES // d_sae)):
            bounds = self.bounds(tile, workspace.take("tile", (len(tile), d_sae), tile))
            screened = _screened_tile(tile, encoder, bounds, k)
            best.append(screened or encode_top_k(tile, encoder, [Query(k)], workspace)[0])
        return TopK(torch.cat([tile.scores for tile in best]), torch.cat([tile.indices for tile in best]))


def can_be_screened(encoder: Encoder) -> bool:
    """Whether bounds apply: on a CPU, to scores ranked by value, in a precision that the slack covers."""
    rows = encoder.rows
    wide = rows.dtype in (torch.float32, torch.float64) and encoder.matmul_dtype in (None, rows.dtype)
    return wide and rows.device.type == "cpu" and not encoder.magnitude and rows.shape[0] % _GROUP == 0


def _screened_tile(
    x: Float[Tensor, "n_tokens d_in"], encoder: Encoder, bounds: Float[Tensor, "n_tokens d_sae"], k: int
) -> TopK | None:
    """The k largest scores of each token; None where the whole product costs less, or scores are not numbers."""
    n_tokens, d_sae = bounds.shape
    n_groups = d_sae // _GROUP
    if n_groups < k:
        return None
    # A group is every n_groups-th feature, so that maxima are taken between rows of numbers, as vectors.
    maxima = bounds.view(n_tokens, _GROUP, n_groups).amax(dim=1)
    members = torch.arange(_GROUP, device=x.device) * n_groups

    # Exact scores of the features with the largest bounds: their k-th best is at most the k-th best of all.
    n_first = min(_FIRST * k, n_groups)
    groups = top_k(maxima, n_first).indices
    first = (groups[:, :, None] + members).flatten(1)
    first = first.gather(1, top_k(bounds.gather(1, first), n_first).indices)
    starts = torch.arange(0, first.numel() + 1, n_first, device=x.device)
    threshold = _scores(x, encoder, starts, first.flatten()).view(n_tokens, n_first).topk(k, dim=1).values[:, -1]

    # Not ">=", or bounds that are not numbers would rule out features whose scores are none either.
    tokens, groups = (~(maxima < threshold[:, None])).nonzero(as_tuple=True)
    if tokens.numel() * (_SCORE_COST * x.shape[1] + _FIND_COST) > n_tokens * d_sae * x.shape[1]:
        return None
    features = groups[:, None] + members
    reaches = ~(bounds.take(features + tokens[:, None] * d_sae) < threshold[tokens, None])
    features = features[reaches]
    counts = torch.zeros(n_tokens, dtype=torch.int64, device=x.device).index_add_(0, tokens, reaches.sum(dim=1))
    if (counts < k).any():  # only where scores are not numbers
        return None
    return _best_of_candidates(x, encoder, counts, features, k)


def _best_of_candidates(
    x: Float[Tensor, "n_tokens d_in"],
    encoder: Encoder,
    counts: Int64[Tensor, " n_tokens"],
    features: Int64[Tensor, " n_candidates"],
    k: int,
) -> TopK:
    """The k largest scores among the candidates of each token, ``counts`` of them for each, at least k."""
    starts = functional.pad(counts.cumsum(0), (1, 0))
    scores = _scores(x, encoder, starts, features)

    # Side by side, filled up with scores that lose.
    tokens = torch.arange(len(x), device=x.device).repeat_interleave(counts, output_size=features.numel())
    slots = torch.arange(features.numel(), device=x.device) - starts[tokens]
    table = scores.new_full((len(x), int(counts.max())), -torch.inf)
    table[tokens, slots] = scores
    best = table.topk(k, dim=1, sorted=False)
    return TopK(best.values, features[starts[:-1, None] + best.indices])


def _scores(
    x: Float[Tensor, "n_tokens d_in"],
    encoder: Encoder,
    row_starts: Int64[Tensor, " n_tokens_and_1"],
    features: Int64[Tensor, " n_entries"],
) -> Float[Tensor, " n_entries"]:
    """Exact scores of features ``row_starts[i]`` to ``row_starts[i + 1]`` of token i."""
    scores = Activations(row_starts, features, x.new_empty(0)).products(x, encoder.rows) + encoder.bias[features]
    return scores if encoder.scale is None else scores * encoder.scale[features]


def _project(encoder: Encoder, basis: Float[Tensor, "d_in rank"]) -> Float[Tensor, "n_features rank_and_2"]:
    coordinates = encoder.rows @ basis
    projected = torch.cat([coordinates, _residual_lengths(encoder.rows, coordinates), encoder.bias[:, None]], dim=1)
    return projected if encoder.scale is None else projected * encoder.scale[:, None]


def _residual_lengths(vectors: Float[Tensor, "n d_in"], coordinates: Float[Tensor, "n rank"]) -> Float[Tensor, "n 1"]:
    """Length of what of each vector lies outside the basis, and a little more, so that rounding is covered.

    From a difference of squares: the residual itself would cost a product as large as the projection.
    """
    whole = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    outside = (whole.square() - coordinates.square().sum(dim=1, keepdim=True)).clamp(min=0).sqrt()
    lengths: Tensor = outside + _SLACK * whole
    return lengths


class AdaptiveScreen:
    """The screen of a training run: chosen again from time to time, and dropped while the whole product is cheaper."""

    def __init__(self) -> None:
        self.screen: Screen | None = None
        self._steps_left = 0
        self._changed_share = 1.0

    def top_k(self, x: Float[Tensor, "n_tokens d_in"], encoder: Encoder, k: int, workspace: Workspace) -> TopK:
        """The k largest scores of each token (n_tokens, k), by whichever way is cheaper."""
        if self.screen is not None and not self.screen.describes(encoder):
            self._steps_left = 0  # someone else has written to the weights
        if self._steps_left == 0:
            self.screen = choose_screen(x, encoder, k, self._changed_share)
            self._steps_left = _STEPS_WITH if self.screen is not None else _STEPS_WITHOUT
        self._steps_left -= 1
        if self.screen is None:
            return encode_top_k(x, encoder, [Query(k)], workspace)[0]
        return self.screen.top_k(x, encoder, k, workspace)

    def rows_changed(self, encoder: Encoder, rows: Int64[Tensor, " n_rows"]) -> None:
        """To be called when the optimizer has moved some rows."""
        self._changed_share = rows.numel() / encoder.rows.shape[0]
        if self.screen is not None:
            self.screen.update_(encoder, rows)


def choose_screen(
    x: Float[Tensor, "n_tokens d_in"], encoder: Encoder, k: int, changed_share: float = 1.0
) -> Screen | None:
    """The screen that is cheapest for activations like ``x``; None where the whole product costs less.

    Screens are compared by the candidates they leave on a sample of tokens, at costs that are constants of this file:
    the choice is a function of the data and of the kind of processor, and a run can be repeated.

    Args:
        x: what the encoder reads.
        encoder: the features.
        k: features a token.
        changed_share: share of the rows that a step changes, and which must be projected again.
    """
    if not can_be_screened(encoder) or len(x) == 0 or encoder.rows.shape[0] < _FIRST * k * _GROUP:
        return None
    second_moment = (x.t() @ x).double()
    if not second_moment.isfinite().all():
        return None
    sample = _Sample.of(x, encoder, k, changed_share)
    if can_be_quantized(encoder) and multiplies_integers_fast() and sample.quantized_cost() < encoder.rows.shape[1]:
        return QuantizedScreen.of(encoder)
    basis = torch.linalg.eigh(second_moment).eigenvectors.flip(1).to(x.dtype)
    rank = sample.cheapest_rank(basis)
    return None if rank is None else ProjectionScreen.of(encoder, basis[:, :rank].contiguous())


@dataclass(frozen=True)
class _Sample:
    """Some tokens and some features, by which the costs of screens are estimated before one is made of all.

    Costs are multiply-adds for each token and feature: the whole product costs d_in.

    Attributes:
        tokens: every so many of the batch.
        encoder: every ``stride``-th feature.
        scores: exact ones of these tokens and features.
        k: features a token, of all features.
        n_best: as many of these features as k is of all.
        stride: see ``encoder``.
        d_sae: number of all features.
        changed_share: share of the rows that a step changes.
        n_batch: tokens of a step.
    """

    tokens: Float[Tensor, "n_tokens d_in"]
    encoder: Encoder
    scores: Float[Tensor, "n_tokens n_features"]
    k: int
    n_best: int
    stride: int
    d_sae: int
    changed_share: float
    n_batch: int

    @classmethod
    def of(cls, x: Float[Tensor, "n_batch d_in"], encoder: Encoder, k: int, changed_share: float) -> _Sample:
        tokens = x[:: -(-len(x) // _SAMPLE_TOKENS)]
        d_sae = encoder.rows.shape[0]
        # At most every (k / 4)-th feature, so that at least four are left to set a threshold by.
        stride = max(1, min(d_sae // _SAMPLE_FEATURES, k // 4))
        features = encoder.among(torch.arange(0, d_sae, stride, device=x.device))
        scores = (tokens @ features.rows.t() + features.bias) * (1.0 if features.scale is None else features.scale)
        return cls(tokens, features, scores, k, -(-k // stride), stride, d_sae, changed_share, len(x))

    def quantized_cost(self) -> float:
        """The cost of 8-bit bounds and of the exact scores that they leave."""
        d_in = self.tokens.shape[1]
        cost = _INTEGER_PRODUCT * d_in + _INTEGER_COMPARE_COST + _ROUND_COST * d_in * self.changed_share / self.n_batch
        threshold = self.scores.topk(self.n_best, dim=1).values[:, -1:]
        return cost + self._cost_of_candidates(QuantizedScreen.of(self.encoder).bounds(self.tokens), threshold)

    def cheapest_rank(self, basis: Float[Tensor, "d_in d_in"]) -> int | None:
        """The rank of the projection that costs least; None where each costs more than the whole product."""
        d_in = self.tokens.shape[1]
        chosen, least = None, float(d_in)
        for rank in sorted({max(8, round(share * d_in / 8) * 8) for share in _RANK_SHARES}):
            bounds = ProjectionScreen.of(self.encoder, basis[:, :rank]).bounds(self.tokens)
            first = self.scores.gather(1, bounds.topk(_FIRST * self.n_best, dim=1).indices)
            cost = rank + _COMPARE_COST + rank * d_in * self.changed_share / self.n_batch
            cost += self._cost_of_candidates(bounds, first.topk(self.n_best, dim=1).values[:, -1:])
            cost += _FIRST * self.k * (_SCORE_COST * d_in + _FIND_COST) / self.d_sae
            if cost < least:
                chosen, least = rank, cost
        return chosen

    def _cost_of_candidates(
        self, bounds: Float[Tensor, "n_tokens n_features"], threshold: Float[Tensor, "n_tokens 1"]
    ) -> float:
        candidates = self.stride * float((bounds >= threshold).sum(dim=1).float().mean())
        return candidates * (_SCORE_COST * self.tokens.shape[1] + _FIND_COST) / self.d_sae
