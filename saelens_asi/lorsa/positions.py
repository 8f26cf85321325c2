"""Rotary positions, from their settings alone (arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saelens_asi.lorsa.config import Llama3Scaling, RotaryPositions


def rotary_table(rotary: RotaryPositions, n_ctx: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, each (n_ctx, dim / 2) float32, one column a pair of dimensions."""
    exponents = torch.arange(0, rotary.dim, 2, dtype=torch.float32) / rotary.dim
    frequencies = 1 / (rotary.base**exponents)  # radians a position
    frequencies = frequencies / rotary.linear_factor
    if rotary.llama3 is not None:
        frequencies = _llama3_frequencies(frequencies, rotary.llama3)
    angles = torch.arange(n_ctx, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _llama3_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1's rule: the share of the unscaled frequency grows linearly in context / wavelength."""
    turns = scaling.original_context * frequencies / (2 * math.pi)
    unscaled = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    unscaled = unscaled.clamp(0, 1)
    return frequencies * (unscaled + (1 - unscaled) / scaling.factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, adjacent_pairs: bool) -> Tensor:
    """Rotate the leading dimensions of ``x`` (..., n_positions, d) by the angles of a (n_positions, pairs) table."""
    n_pairs = cos.shape[-1]
    turning, passing = x[..., : 2 * n_pairs], x[..., 2 * n_pairs :]
    if adjacent_pairs:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning[..., :n_pairs], turning[..., n_pairs:]
    rotated = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(rotated, dim=-1).flatten(-2) if adjacent_pairs else torch.cat(rotated, dim=-1)
    return torch.cat([turned, passing], dim=-1)
