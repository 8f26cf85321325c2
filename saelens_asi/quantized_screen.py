"""Exact TopK from 8-bit scores, for processors that multiply integers faster than floating-point numbers.

Rows of encoder and activations are rounded to 8 bits after a rotation that evens out their coordinates:
``w = a q + e`` and ``x = c p + d`` with integers p and q. Then ``x . w = c a (p . q) + d . (a q) + x . e``: a product
of integers and a rest that is at most ``|d| |a q| + |x| |e|``, about 1.5 % of ``|x| |w|``. Exact scores are taken in
the order of these bounds until no bound exceeds the k-th best. It needs no structure in the activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from saelens_asi.kernels import kernels_take, run_kernel
from saelens_asi.top_k import Encoder, Query, TopK, encode_top_k
from saelens_asi.workspace import Workspace

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
            fixed = (x[part], encoder.rows, encoder.bias, scale, tokens[:, part].contiguous(), self.terms, sums, most)
            run_kernel("best_of_bounds", len(tile), *fixed, found.scores[part], found.indices[part])
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
    d_in = table.shape[1]
    run_kernel(
        "quantize_rows", rows.numel(), table, scale, rows, d_in & -d_in, _slack(d_in), codes, step, coded, missed
    )


def _slack(n: int) -> float:
    """What rounding can do to a float32 sum of n products, relative to their lengths, with room."""
    return 2 * (n + 16) * torch.finfo(torch.float32).eps


def _scale_of(encoder: Encoder) -> Tensor:
    return torch.ones_like(encoder.bias) if encoder.scale is None else encoder.scale
