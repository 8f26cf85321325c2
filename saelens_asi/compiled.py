"""Loops of a training step, compiled by numba: each reads what it needs from memory once. See ``kernels.py``.

Every function works on rows ``lo`` to ``hi`` of its output, so that threads share the work without meeting, and is
compiled for float32 and float64 when this module is imported; numba keeps the result on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import float32, float64, int64, njit, void

# Sums may be taken in the order that suits vectors; numbers that are not finite stay what they are.
FASTMATH = {"reassoc", "contract", "nsz"}

_Function = Callable[..., Any]


def _for_both_dtypes(*arguments: Any) -> Callable[[_Function], _Function]:
    """Compile for float32 and float64; arguments are functions of the dtype."""
    signatures = [void(*(argument(dtype) for argument in arguments), int64, int64) for dtype in (float32, float64)]
    return njit(signatures, nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")


def _scalar(dtype: Any) -> Any:
    return dtype


def _vector(dtype: Any) -> Any:
    return dtype[::1]


def _matrix(dtype: Any) -> Any:
    return dtype[:, ::1]


def _integers(dtype: Any) -> Any:
    return int64[::1]


@njit([dtype(dtype[::1]) for dtype in (float32, float64)], nogil=True, cache=True, fastmath=FASTMATH)
def _length(row: Any) -> Any:
    """The Euclidean norm of a row, to the same bits wherever it is asked for."""
    total = row.dtype.type(0)
    for j in range(row.shape[0]):
        total += row[j] * row[j]
    return math.sqrt(total)


@_for_both_dtypes(_matrix, _vector)
def row_lengths(table: Any, norms: Any, lo: int, hi: int) -> None:
    """The norms of the rows of ``table`` (n, d) go to ``norms`` (n,)."""
    for i in range(lo, hi):
        norms[i] = _length(table[i])


@_for_both_dtypes(
    _matrix,
    _matrix,
    _matrix,
    _integers,
    _matrix,
    _vector,
    _vector,
    _vector,
    _scalar,
    _scalar,
    _scalar,
    _scalar,
    _scalar,
    _scalar,
)
def adam_rows(
    param: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    rows: Any,
    grad: Any,
    norms: Any,
    step_size: Any,
    root_scale: Any,
    beta1: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
    eps: Any,
    grad_scale: Any,
    lo: int,
    hi: int,
) -> None:
    """Adam for ``rows[lo:hi]``; ``step_size`` and ``root_scale`` (n_rows,) carry the bias corrections.

    The new lengths of these rows go to ``norms`` (n,), unless that is empty.
    """
    for i in range(lo, hi):
        p, m, v, g = param[rows[i]], exp_avg[rows[i]], exp_avg_sq[rows[i]], grad[i]
        for j in range(p.shape[0]):
            gradient = g[j] * grad_scale
            mean = beta1 * m[j] + rest1 * gradient
            square = beta2 * v[j] + rest2 * gradient * gradient
            m[j] = mean
            v[j] = square
            p[j] -= step_size[i] * mean / (math.sqrt(square) * root_scale[i] + eps)
        if norms.shape[0] > 0:
            norms[rows[i]] = _length(p)


@_for_both_dtypes(
    _matrix, _matrix, _matrix, _integers, _integers, _integers, _vector, _matrix, _matrix, _vector, _vector
)
def feature_gradients(
    d_decoded: Any,
    x: Any,
    table: Any,
    active: Any,
    starts: Any,
    rows: Any,
    values: Any,
    d_encoder: Any,
    d_decoder: Any,
    d_bias: Any,
    squares: Any,
    lo: int,
    hi: int,
) -> None:
    """Gradients of the active features, of which feature ``active[i]`` has entries ``starts[i]`` to ``starts[i + 1]``.

    Entry e is in row ``rows[e]`` of ``d_decoded`` with ``values[e]``, and its gradient d is the product of that row and
    the feature's of ``table``. ``d_decoder[i]`` sums ``values * d_decoded``, ``d_encoder[i]`` sums ``d * x``,
    ``d_bias[i]`` sums d, and ``squares[i]`` is the squared length of all three.
    """
    width, n_tokens = x.shape[1], x.shape[0]
    zero = d_bias.dtype.type(0)
    for i in range(lo, hi):
        weights, encoder, decoder = table[active[i]], d_encoder[i], d_decoder[i]
        encoder[:] = 0
        decoder[:] = 0
        total, square = zero, zero
        e, stop = starts[i], starts[i + 1]
        while e + 1 < stop:
            a, b, va, vb = d_decoded[rows[e]], d_decoded[rows[e + 1]], values[e], values[e + 1]
            da, db = zero, zero
            for j in range(width):
                da += a[j] * weights[j]
                db += b[j] * weights[j]
            for j in range(width):
                decoder[j] += va * a[j] + vb * b[j]
            a, b = x[rows[e] % n_tokens], x[rows[e + 1] % n_tokens]
            for j in range(width):
                encoder[j] += da * a[j] + db * b[j]
            total += da + db
            e += 2
        if e < stop:
            a, va, da = d_decoded[rows[e]], values[e], zero
            for j in range(width):
                da += a[j] * weights[j]
            for j in range(width):
                decoder[j] += va * a[j]
            a = x[rows[e] % n_tokens]
            for j in range(width):
                encoder[j] += da * a[j]
            total += da
        for j in range(width):
            square += encoder[j] * encoder[j] + decoder[j] * decoder[j]
        d_bias[i] = total
        squares[i] = square + total * total


@_for_both_dtypes(_matrix, _vector, _matrix, _matrix, _vector, _scalar)
def squared_errors(
    decoded: Any, bias: Any, target: Any, gradient: Any, errors: Any, scale: Any, lo: int, hi: int
) -> None:
    """``bias`` is added to ``decoded``; its squared distance from ``target`` goes to ``errors`` (n_rows,), and
    ``scale`` times the difference to ``gradient``.
    """
    for i in range(lo, hi):
        row, wanted, slope = decoded[i], target[i], gradient[i]
        total = errors.dtype.type(0)
        for j in range(row.shape[0]):
            number = row[j] + bias[j]
            difference = number - wanted[j]
            row[j] = number
            slope[j] = scale * difference
            total += difference * difference
        errors[i] = total


@njit([void(*[int64[::1]] * 5, int64, int64)], nogil=True, cache=True)
def sort_by_feature(features: Any, row_starts: Any, starts: Any, order: Any, rows: Any, lo: int, hi: int) -> None:
    """A stable counting sort of all entries, which one thread does alone: it has the only row, 0 to 1.

    ``order`` and ``rows`` get position and row of each entry, feature after feature. ``starts`` (n_features + 2,),
    zeros before, gets where each feature begins, and the number of entries twice.
    """
    for e in range(features.shape[0]):
        starts[features[e] + 2] += 1
    for f in range(2, starts.shape[0]):
        starts[f] += starts[f - 1]
    for row in range(row_starts.shape[0] - 1):
        for e in range(row_starts[row], row_starts[row + 1]):
            place = starts[features[e] + 1]
            order[place], rows[place] = e, row
            starts[features[e] + 1] = place + 1
