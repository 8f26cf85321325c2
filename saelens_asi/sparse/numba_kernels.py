"""Loops of a training step, compiled by numba: each reads what it needs from memory once. See ``kernels.py``.

Every function works on rows ``lo`` to ``hi`` of its output, so that threads share the work without meeting, and is
compiled for float32 and float64 when this module is imported; numba keeps the result on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, float64, int8, int32, int64, njit, void

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


_FLOATS, _INTS = float32[::1], int64[::1]


@njit(
    void(float32[:, ::1], _FLOATS, _INTS, int64, float32, int8[:, ::1], _FLOATS, _FLOATS, _FLOATS, int64, int64),
    nogil=True,
    cache=True,
    fastmath=FASTMATH,
    error_model="numpy",
)
def quantize_rows(
    table: Any,
    scale: Any,
    rows: Any,
    block: int,
    slack: Any,
    codes: Any,
    steps: Any,
    lengths: Any,
    rests: Any,
    lo: int,
    hi: int,
) -> None:
    """``steps * codes`` for some rows of ``scale * table``, rotated, its length, and the length of what it misses.

    The rotation is a Hadamard matrix over ``block`` coordinates (a power of two that divides their number), which
    makes the largest coordinate of a row small. ``slack`` times the length of the row is added to ``rests``.
    """
    width = table.shape[1]
    values, peaks = np.empty(width, np.float32), np.empty(64, np.float32)
    half_turn = np.float32(1 / math.sqrt(block))
    for i in range(lo, hi):
        row = rows[i]
        factor = scale[row] * half_turn
        source, target = table[row], codes[row]
        for j in range(width):
            values[j] = source[j] * factor
        distance = width // block
        while distance < width:
            if width % (2 * distance) != 0:
                break
            for first in range(0, width, 2 * distance):
                left, right = values[first : first + distance], values[first + distance : first + 2 * distance]
                for j in range(distance):
                    a, b = left[j], right[j]
                    left[j] = a + b
                    right[j] = a - b
            distance *= 2
        peaks[:] = 0
        for first in range(0, width, peaks.shape[0]):
            part = values[first : first + peaks.shape[0]]
            for j in range(part.shape[0]):
                peaks[j] = abs(part[j]) if abs(part[j]) > peaks[j] else peaks[j]
        largest = np.float32(0)
        for j in range(peaks.shape[0]):
            largest = max(largest, peaks[j])
        square = np.float32(0)
        for j in range(width):
            square += values[j] * values[j]
        step = largest / np.float32(127)
        inverse = np.float32(127) / largest if largest > np.float32(1e-30) else np.float32(0)
        inside = np.float32(0)
        outside = np.float32(0)
        for j in range(width):
            code = np.rint(values[j] * inverse)
            target[j] = np.int8(code)
            inside += code * code
            outside += (values[j] - step * code) ** 2
        steps[row] = step
        lengths[row] = step * math.sqrt(inside)
        rests[row] = math.sqrt(outside) + slack * math.sqrt(square)


@njit(
    void(
        float32[:, ::1],
        float32[:, ::1],
        _FLOATS,
        _FLOATS,
        float32[:, ::1],
        float32[:, ::1],
        int32[:, ::1],
        int64,
        float32[:, ::1],
        int64[:, ::1],
        int64,
        int64,
    ),
    nogil=True,
    cache=True,
    fastmath=FASTMATH,
    error_model="numpy",
)
def best_of_bounds(
    x: Any,
    table: Any,
    bias: Any,
    scale: Any,
    tokens: Any,
    features: Any,
    sums: Any,
    most: int,
    scores: Any,
    indices: Any,
    lo: int,
    hi: int,
) -> None:
    """The largest scores ``(x . table + bias) * scale`` of each token, exactly, best bound first.

    The bound of a token's feature is ``t0 * (f0 * sum) + f1 + t1 * f2 + t2 * f3`` with its column of ``tokens`` (3, n)
    and of ``features`` (4, d_sae). Exact scores are taken in the order of bounds, until the k-th best of them reaches
    the next bound. A token that needs more than ``most`` of them is given up: its first index is -1.
    """
    d_sae, width, k = table.shape[0], x.shape[1], scores.shape[1]
    n_groups = (d_sae + 31) // 32  # a group is every n_groups-th feature, a family every n_families-th group
    n_families = (n_groups + 31) // 32
    lost, zero = np.float32(-np.inf), np.float32(0)
    picked, products = np.empty(4, np.int64), np.empty(4, np.float32)
    bounds = np.full(n_groups * 32, lost, np.float32)
    groups = np.full(n_families * 32, lost, np.float32)
    families = np.empty(n_families, np.float32)
    f0, f1, f2, f3 = features[0], features[1], features[2], features[3]
    for token in range(lo, hi):
        t0, t1, t2 = tokens[0, token], tokens[1, token], tokens[2, token]
        row, own, heap, who = sums[token], x[token], scores[token], indices[token]
        groups[:] = lost
        families[:] = lost
        for first in range(0, d_sae, n_groups):
            part = bounds[first : min(first + n_groups, d_sae)]
            own_sums, g0, g1, g2, g3 = row[first:], f0[first:], f1[first:], f2[first:], f3[first:]
            for j in range(part.shape[0]):
                part[j] = t0 * (g0[j] * np.float32(own_sums[j])) + g1[j] + t1 * g2[j] + t2 * g3[j]
            for j in range(part.shape[0]):  # a loop of its own: with more arrays in one it is not made vectors
                groups[j] = part[j] if part[j] > groups[j] else groups[j]
        for first in range(0, n_groups, n_families):
            part = groups[first : first + n_families]
            for j in range(n_families):
                families[j] = part[j] if part[j] > families[j] else families[j]
        heap[:] = lost
        who[:] = -1
        n_scored = 0
        while True:
            n_picked = 0
            while n_picked < picked.shape[0]:
                family = 0
                for j in range(1, n_families):
                    if families[j] > families[family]:
                        family = j
                if families[family] <= heap[0]:
                    break
                group = family
                while groups[group] != families[family]:
                    group += n_families
                f = group
                while bounds[f] != groups[group]:
                    f += n_groups
                picked[n_picked] = f
                n_picked += 1
                bounds[f] = lost
                largest = lost
                for j in range(group, n_groups * 32, n_groups):
                    largest = bounds[j] if bounds[j] > largest else largest
                groups[group] = largest
                largest = lost
                for j in range(family, n_families * 32, n_families):
                    largest = groups[j] if groups[j] > largest else largest
                families[family] = largest
            if n_picked == 0:
                break
            n_scored += n_picked
            if n_scored > most:
                who[0] = -1
                break
            for i in range(n_picked, picked.shape[0]):
                picked[i] = picked[0]
            # Four rows at once, since what this waits for is memory.
            a, b, c, d = table[picked[0]], table[picked[1]], table[picked[2]], table[picked[3]]
            sa, sb, sc, sd = zero, zero, zero, zero
            for j in range(width):
                sa += own[j] * a[j]
                sb += own[j] * b[j]
                sc += own[j] * c[j]
                sd += own[j] * d[j]
            products[0], products[1], products[2], products[3] = sa, sb, sc, sd
            for i in range(n_picked):
                score = (products[i] + bias[picked[i]]) * scale[picked[i]]
                if score > heap[0]:
                    at = 0  # the root of a heap in which a parent is at most its children
                    while True:
                        child = 2 * at + 1
                        if child >= k:
                            break
                        if child + 1 < k and heap[child + 1] < heap[child]:
                            child += 1
                        if heap[child] >= score:
                            break
                        heap[at], who[at] = heap[child], who[child]
                        at = child
                    heap[at], who[at] = score, picked[i]
