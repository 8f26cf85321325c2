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
bound exceeds the k-th best. It needs no structure in the activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from saelens_asi.sparse import kernels
from saelens_asi.sparse.kernels import kernels_take
from saelens_asi.sparse.rows import Activations, Workspace
from saelens_asi.sparse.topk import TILE_ENTRIES, Encoder, Query, TopK, encode_top_k, top_k

# Scores of one tile (64 MiB), and tokens in it, from which on the integer product runs at full speed.
_TILE_ENTRIES, _TILE_TOKENS = 2**24, 512

# A token that needs exact scores of more than this share of the features is left to the whole product.
_MAX_SCORED_SHARE = 1 / 32


@dataclass(frozen=True)
class QuantizedScreen:
    """Encoder rows in 8 bits, and what bounds need to know of each.

    Attributes:
        codes: (d_sae, d_in) int8, of the rotated and scaled rows.
        terms: (4, d_sae) step of the codes, scaled bias, length of the coded row, length of what the codes miss.
    """

    codes: Tensor
    terms: Tensor

    @classmethod
    def of(cls, encoder: Encoder) -> QuantizedScreen:
        screen = cls(torch.empty_like(encoder.rows, dtype=torch.int8), encoder.rows.new_empty(4, len(encoder.rows)))
        screen.update_(encoder, torch.arange(len(encoder.rows)))
        return screen

    def update_(self, encoder: Encoder, changed: Tensor) -> None:
        """Round the rows that have changed, (n_changed,) int64."""
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

    def bounds(self, x: Tensor) -> Tensor:
        """(n_tokens, d_sae): numbers that no score exceeds."""
        codes, tokens = _quantize_tokens(x)
        step, bias, coded, missed = self.terms
        sums = torch._int_mm(codes, self.codes.t())
        return tokens[0][:, None] * (step * sums) + bias + tokens[1][:, None] * coded + tokens[2][:, None] * missed

    def top_k(self, x: Tensor, encoder: Encoder, k: int, workspace: Workspace) -> TopK:
        """The k largest scores of each token, exactly; tokens with too many candidates take the whole product.

        Args:
            x: (n_tokens, d_in).
            encoder: as this screen was made from, or brought up to date with.
            k: features a token.
            workspace: see ``encode_top_k``.
        """
        d_sae = len(self.codes)
        found = TopK(x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64))
        x = x.contiguous()
        codes, tokens = _quantize_tokens(x)
        scale, most = _scale_of(encoder), max(2 * k, int(d_sae * _MAX_SCORED_SHARE))
        n_tile = max(_TILE_TOKENS, _TILE_ENTRIES // d_sae)
        for first in range(0, len(x), n_tile):
            part = slice(first, first + n_tile)
            tile = codes[part]
            sums = workspace.take("integer tile", (len(tile), d_sae), x, torch.int32)
            torch._int_mm(tile, self.codes.t(), out=sums)
            kernels.top_k_by_bounds(
                x[part],
                encoder.rows,
                encoder.bias,
                scale,
                tokens[:, part].contiguous(),
                self.terms,
                sums,
                max_scored=most,
                scores=found.scores[part],
                indices=found.indices[part],
            )
        failed = (found.indices[:, 0] < 0) | ~found.scores.isfinite().all(dim=1) | ~tokens.isfinite().all(dim=0)
        if not self.terms.isfinite().all():
            failed.fill_(True)
        if failed.any():
            (dense,) = encode_top_k(x[failed], encoder, [Query(k)], workspace)
            found.scores[failed], found.indices[failed] = dense
        return found


def can_be_quantized(encoder: Encoder) -> bool:
    """Whether bounds hold for the encoder, and this processor multiplies integers exactly and fast."""
    rows = encoder.rows
    if min(rows.shape) < 2:  # torch._int_mm misreads the strides of a single column
        return False
    fitting = rows.dtype == torch.float32 and encoder.matmul_dtype in (None, torch.float32) and not encoder.magnitude
    return fitting and rows.is_contiguous() and _multiplies_integers() and kernels_take(rows)


@cache
def _multiplies_integers() -> bool:
    """Whether 8-bit products are added up in 32 bits (VNNI); older instructions saturate at 16."""
    if not getattr(torch.cpu, "_is_vnni_supported", bool)():
        return False
    codes = torch.full((64, 576), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, -codes.t()) == -576 * 127**2).all())


def _quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n_tokens, d_in) int8, and (3, n_tokens): their step, the length of what they miss, and of the token."""
    x = x.contiguous()
    codes, terms = torch.empty_like(x, dtype=torch.int8), x.new_empty(3, len(x))
    coded = x.new_empty(len(x))
    step, missed, whole = terms
    _quantize(x, x.new_ones(len(x)), torch.arange(len(x)), codes, step, coded, missed)
    torch.add(coded, missed, out=whole)
    return codes, terms


def _quantize(
    table: Tensor, scale: Tensor, rows: Tensor, codes: Tensor, step: Tensor, coded: Tensor, missed: Tensor
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
    """What rounding can do to a float32 sum of n products, relative to their lengths, with room."""
    return 2 * (n + 16) * torch.finfo(torch.float32).eps


def _scale_of(encoder: Encoder) -> Tensor:
    return torch.ones_like(encoder.bias) if encoder.scale is None else encoder.scale


# Columns of a group whose largest bound stands for all of them.
_GROUP = 16

# Features with the largest bounds that are scored first, as a multiple of k.
_FIRST = 2

# Costs in multiply-adds of a dense product, measured on x86: an exact score costs so many for each of its d_in, and so
# many more to be found; comparing the bounds costs as much as so many directions of the product.
_SCORE_COST = 28
_FIND_COST = 30_000
_COMPARE_COST = 40

# The same for 8-bit scores: of a product in shares of the whole product, of comparing, and of rounding a number.
_INTEGER_PRODUCT, _INTEGER_COMPARE_COST, _ROUND_COST = 1 / 3, 50, 140

# Rounding of float32 products, relative to |x| |w|, is covered by widening both rests by this share of the whole.
_SLACK = 3e-3

_SAMPLE_TOKENS, _SAMPLE_FEATURES = 128, 8192
_RANK_SHARES = (1 / 8, 3 / 16, 1 / 4, 1 / 3, 4 / 9, 5 / 9, 2 / 3)

# Steps after which the rank is chosen anew, with a screen and without one.
_STEPS_WITH, _STEPS_WITHOUT = 25, 200


@dataclass(frozen=True)
class Screen:
    """Encoder rows seen from the leading directions of the activations.

    Attributes:
        basis: (d_in, r) orthonormal.
        rows: (d_sae, r + 2): coordinates of each scaled row, the length of its rest, and its scaled bias.
    """

    basis: Tensor
    rows: Tensor

    @classmethod
    def of(cls, encoder: Encoder, basis: Tensor) -> Screen:
        return cls(basis, _project(encoder, basis))

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def update_(self, encoder: Encoder, changed: Tensor, chunk: int = 4096) -> None:
        """Project the rows that have changed, (n_changed,) int64."""
        for features in changed.split(chunk):
            self.rows[features] = _project(encoder.among(features), self.basis)

    def describes(self, encoder: Encoder) -> bool:
        """Whether a sample of the rows is projected as they are now."""
        sample = torch.arange(0, len(self.rows), max(1, len(self.rows) // 64), device=self.rows.device)
        now = _project(encoder.among(sample), self.basis)
        return torch.allclose(self.rows[sample], now, rtol=1e-3, atol=1e-3 * float(now.abs().max()))

    def bounds(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(n_tokens, d_sae): numbers that no score exceeds."""
        inside = x @ self.basis
        left = torch.cat([inside, _rest(x, inside), x.new_ones(len(x), 1)], dim=1)
        return torch.mm(left, self.rows.t(), out=out)

    def top_k(self, x: Tensor, encoder: Encoder, k: int, workspace: Workspace) -> TopK:
        """See ``screened_top_k``."""
        return screened_top_k(x, encoder, self, k, workspace)


class AdaptiveScreen:
    """The screen of a training run: chosen again from time to time, and dropped while the whole product is cheaper."""

    def __init__(self) -> None:
        self.screen: Screen | QuantizedScreen | None = None
        self._steps_left = 0
        self._changed_share = 1.0

    def top_k(self, x: Tensor, encoder: Encoder, k: int, workspace: Workspace) -> TopK:
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

    def rows_changed(self, encoder: Encoder, rows: Tensor) -> None:
        """To be called when the optimizer has moved some rows."""
        self._changed_share = rows.numel() / encoder.rows.shape[0]
        if self.screen is not None:
            self.screen.update_(encoder, rows)


def choose_screen(x: Tensor, encoder: Encoder, k: int, changed_share: float = 1.0) -> Screen | QuantizedScreen | None:
    """The screen that is cheapest for activations like ``x``; None where the whole product costs less.

    Screens are compared by the candidates they leave on a sample of tokens, at costs that are constants of this file:
    the choice is a function of the data and of the kind of processor.

    Args:
        x: (n_tokens, d_in), what the encoder reads.
        encoder: the features.
        k: features a token.
        changed_share: share of the rows that a step changes, and which must be projected again.
    """
    d_sae, d_in = encoder.rows.shape
    if not can_be_screened(encoder) or len(x) == 0 or d_sae < _FIRST * k * _GROUP:
        return None
    second_moment = (x.t() @ x).double()
    if not second_moment.isfinite().all():
        return None
    tokens = x[:: -(-len(x) // _SAMPLE_TOKENS)]
    every = max(1, min(d_sae // _SAMPLE_FEATURES, k // 4))
    features = encoder.among(torch.arange(0, d_sae, every, device=x.device))
    exact = (tokens @ features.rows.t() + features.bias) * (1.0 if features.scale is None else features.scale)
    n_best = -(-k // every)

    def cost_of_candidates(bounds: Tensor, threshold: Tensor) -> float:
        candidates = every * float((bounds >= threshold).sum(dim=1).float().mean())
        return candidates * (_SCORE_COST * d_in + _FIND_COST) / d_sae

    if can_be_quantized(encoder):
        cost = _INTEGER_PRODUCT * d_in + _INTEGER_COMPARE_COST + _ROUND_COST * d_in * changed_share / len(x)
        threshold = exact.topk(n_best, dim=1).values[:, -1:]
        if cost + cost_of_candidates(QuantizedScreen.of(features).bounds(tokens), threshold) < d_in:
            return QuantizedScreen.of(encoder)
    basis = torch.linalg.eigh(second_moment).eigenvectors.flip(1).to(x.dtype)
    chosen, least = None, float(d_in)
    for rank in sorted({max(8, round(share * d_in / 8) * 8) for share in _RANK_SHARES}):
        bounds = Screen.of(features, basis[:, :rank]).bounds(tokens)
        first = exact.gather(1, bounds.topk(_FIRST * n_best, dim=1).indices)
        cost = rank + _COMPARE_COST + rank * d_in * changed_share / len(x)
        cost += cost_of_candidates(bounds, first.topk(n_best, dim=1).values[:, -1:])
        cost += _FIRST * k * (_SCORE_COST * d_in + _FIND_COST) / d_sae
        if cost < least:
            chosen, least = rank, cost
    return None if chosen is None else Screen.of(encoder, basis[:, :chosen].contiguous())


def can_be_screened(encoder: Encoder) -> bool:
    """Whether bounds apply: on a CPU, to scores ranked by value, in a precision that the slack covers."""
    rows = encoder.rows
    wide = rows.dtype in (torch.float32, torch.float64) and encoder.matmul_dtype in (None, rows.dtype)
    return wide and rows.device.type == "cpu" and not encoder.magnitude and rows.shape[0] % _GROUP == 0


def screened_top_k(x: Tensor, encoder: Encoder, screen: Screen, k: int, workspace: Workspace) -> TopK:
    """The k largest scores of each token, exactly; a tile with too many candidates takes the whole product.

    Args:
        x: (n_tokens, d_in).
        encoder: as ``screen`` was made from, or brought up to date with.
        screen: see ``choose_screen``.
        k: features a token.
        workspace: see ``encode_top_k``.
    """
    found = []
    for tile in x.split(max(1, TILE_ENTRIES // encoder.rows.shape[0])):
        shape = (len(tile), encoder.rows.shape[0])
        bounds = screen.bounds(tile, workspace.take("tile", shape, tile))
        screened = _screened_tile(tile, encoder, bounds, k)
        found.append(screened or encode_top_k(tile, encoder, [Query(k)], workspace)[0])
    return TopK(torch.cat([tile.scores for tile in found]), torch.cat([tile.indices for tile in found]))


def _screened_tile(x: Tensor, encoder: Encoder, bounds: Tensor, k: int) -> TopK | None:
    n_tokens, d_sae = bounds.shape
    n_groups = d_sae // _GROUP
    if n_groups < k:
        return None
    maxima = bounds.view(n_tokens, _GROUP, n_groups).amax(dim=1)  # a group is every n_groups-th feature
    members = torch.arange(_GROUP, device=x.device) * n_groups

    # Exact scores of the features with the largest bounds: their k-th best is at most the k-th best of all.
    n_first = min(_FIRST * k, n_groups)
    groups = top_k(maxima, n_first).indices
    first = (groups[:, :, None] + members).flatten(1)
    first = first.gather(1, top_k(bounds.gather(1, first), n_first).indices)
    starts = torch.arange(0, first.numel() + 1, n_first, device=x.device)
    threshold = _scores(x, encoder, starts, first.flatten()).view(n_tokens, n_first).topk(k, dim=1).values[:, -1]

    tokens, groups = (maxima >= threshold[:, None]).nonzero(as_tuple=True)
    if tokens.numel() * (_SCORE_COST * x.shape[1] + _FIND_COST) > n_tokens * d_sae * x.shape[1]:
        return None
    features = groups[:, None] + members
    kept = bounds.take(features + tokens[:, None] * d_sae) >= threshold[tokens, None]
    features = features[kept]
    counts = torch.zeros(n_tokens, dtype=torch.int64, device=x.device).index_add_(0, tokens, kept.sum(dim=1))
    if (counts < k).any():  # only where scores are not numbers
        return None
    starts = functional.pad(counts.cumsum(0), (1, 0))
    scores = _scores(x, encoder, starts, features)

    # Side by side, filled up with scores that lose.
    tokens = torch.arange(n_tokens, device=x.device).repeat_interleave(counts, output_size=features.numel())
    slots = torch.arange(features.numel(), device=x.device) - starts[tokens]
    table = scores.new_full((n_tokens, int(counts.max())), -torch.inf)
    table[tokens, slots] = scores
    best = table.topk(k, dim=1, sorted=False)
    return TopK(best.values, features[starts[:-1, None] + best.indices])


def _scores(x: Tensor, encoder: Encoder, row_starts: Tensor, features: Tensor) -> Tensor:
    scores = Activations(row_starts, features, x.new_empty(0)).products(x, encoder.rows) + encoder.bias[features]
    return scores if encoder.scale is None else scores * encoder.scale[features]


def _project(encoder: Encoder, basis: Tensor) -> Tensor:
    inside = encoder.rows @ basis
    projected = torch.cat([inside, _rest(encoder.rows, inside), encoder.bias[:, None]], dim=1)
    return projected if encoder.scale is None else projected * encoder.scale[:, None]


def _rest(vectors: Tensor, inside: Tensor) -> Tensor:
    """(n, 1): length of what of each vector lies outside, and a little more, so that rounding is covered."""
    whole = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    outside = (whole.square() - inside.square().sum(dim=1, keepdim=True)).clamp(min=0).sqrt()
    return outside + _SLACK * whole
