"""Exact TopK below the cost of the encoder's matrix product, where activations are low-rank.

A score is split at the leading r directions V of the activations: ``x . w = (V'x) . (V'w) + x_rest . w_rest``. The
first part costs r / d_in of the product, the second is at most ``|x_rest| |w_rest|``. So every score has an upper
bound; features whose bound reaches the k-th best of a few exact scores are scored exactly, all others cannot be among
the k best. With Active Subspace Initialization encoder rows start inside the leading directions (arXiv 2508.16929,
section on Active Subspace Initialization) and stay close to them, so that few features are left in question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from saelens_asi.quantized_screen import QuantizedScreen, can_be_quantized
from saelens_asi.row_sparse import Activations
from saelens_asi.top_k import TILE_ENTRIES, Encoder, Query, TopK, encode_top_k, top_k
from saelens_asi.workspace import Workspace

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
