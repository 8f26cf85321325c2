"""Loops of a training step, compiled by numba: each reads what it needs from memory once. For ``kernels.py`` only.

Every kernel works on rows ``lo`` to ``hi`` of its output, so that threads share the work without meeting. Arguments
are arrays, then whole numbers, then numbers in the dtype of the arrays, and ``kernels.py`` has checked them: a kernel
looks at no bound. Kernels are compiled when this module is imported; numba keeps the result on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import float32, float64, int8, int32, int64, njit, void
from numba.core.types import Type
from numba.core.typing.templates import Signature

Floats: TypeAlias = npt.NDArray[np.float32 | np.float64]
Float: TypeAlias = np.float32 | np.float64
Singles: TypeAlias = npt.NDArray[np.float32]
Integers: TypeAlias = npt.NDArray[np.int64]

_Function = TypeVar("_Function", bound=Callable[..., object])

# Sums may be taken in the order that suits vectors (reassoc, contract, nsz). Not nnan and not ninf: with them the
# compiler may assume that no number is NaN or infinite, but a training step must show where one is, and a screen marks
# by -inf what is taken.
FASTMATH = {"reassoc", "contract", "nsz"}

# Of a token's bounds only the maxima of groups, and of these only the maxima of families, are looked at again. Groups
# and families of 32: an ordinary d_sae is 32^3 = 32,768, whose next bound then costs 32 comparisons on each level.
_GROUP = 32

# Exact scores are taken so many at a time: a product with a row of the encoder waits for memory, and the four requests
# are under way together.
_ROWS_AT_ONCE = 4

# Lanes of a maximum. One running maximum is not made vectors (its order matters where numbers may be NaN), 64 are.
_LANES = 64


def _compiled(*signatures: Signature) -> Callable[[_Function], _Function]:
    """Compile for these signatures, now; without the interpreter's lock, so that threads run side by side."""
    compiled = njit(list(signatures), nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
    return cast("Callable[[_Function], _Function]", compiled)


def _for_both_dtypes(signature: Callable[[Type], Signature]) -> Callable[[_Function], _Function]:
    """Compile for float32 and float64; the signature is a function of the dtype."""
    return _compiled(signature(float32), signature(float64))


def _inlined(function: _Function) -> _Function:
    """A part of a kernel: it becomes part of its caller before types are known, with the caller's options."""
    return cast("_Function", njit(inline="always")(function))


@_for_both_dtypes(lambda dtype: dtype(dtype[::1]))
def _length(row: Floats) -> Float:
    """The Euclidean norm of a row.

    Compiled by itself and not inlined, so that the sum has one order: Adam renews norms to the bits that a resumed run
    computes from the weights.
    """
    total = row.dtype.type(0)
    for j in range(row.shape[0]):
        total += row[j] * row[j]
    return math.sqrt(total)  # type: ignore[return-value]  # compiled, the root has the dtype of the sum


@_for_both_dtypes(lambda dtype: void(dtype[:, ::1], dtype[::1], int64, int64))
def row_lengths(table: Floats, norms: Floats, lo: int, hi: int) -> None:
    """See ``kernels.row_lengths``."""
    for i in range(lo, hi):
        norms[i] = _length(table[i])


@_for_both_dtypes(
    lambda dtype: void(*[dtype[:, ::1]] * 4, int64[::1], *[dtype[::1]] * 6, *[dtype] * 3, int64, int64),
)
def adam_rows(
    param: Floats,
    exp_avg: Floats,
    exp_avg_sq: Floats,
    grad: Floats,
    rows: Integers,
    norms: Floats,
    step_size: Floats,
    root_scale: Floats,
    eps: Floats,
    kept1: Floats,
    kept2: Floats,
    grad_share1: Float,
    grad_share2: Float,
    grad_scale: Float,
    lo: int,
    hi: int,
) -> None:
    """See ``kernels.adam_rows``."""
    for i in range(lo, hi):
        p, m, v, g = param[rows[i]], exp_avg[rows[i]], exp_avg_sq[rows[i]], grad[i]
        # Out of the loop: for all that the compiler knows, a row could overlap them.
        size, scale, small, keep1, keep2 = step_size[i], root_scale[i], eps[i], kept1[i], kept2[i]
        for j in range(p.shape[0]):
            gradient = g[j] * grad_scale
            mean = keep1 * m[j] + grad_share1 * gradient
            square = keep2 * v[j] + grad_share2 * gradient * gradient
            m[j] = mean
            v[j] = square
            p[j] -= size * mean / (math.sqrt(square) * scale + small)
        if norms.shape[0] > 0:
            norms[rows[i]] = _length(p)


@_inlined
def _product(width: int, a: Floats, weights: Floats, zero: Float) -> Float:
    total = zero
    for j in range(width):
        total += a[j] * weights[j]
    return total


@_inlined
def _two_products(width: int, a: Floats, b: Floats, weights: Floats, zero: Float) -> tuple[Float, Float]:
    total_a, total_b = zero, zero
    for j in range(width):
        total_a += a[j] * weights[j]
        total_b += b[j] * weights[j]
    return total_a, total_b


@_inlined
def _add_(width: int, total: Floats, weight: Float, a: Floats) -> None:
    for j in range(width):
        total[j] += weight * a[j]


@_inlined
def _add_two_(width: int, total: Floats, weight_a: Float, a: Floats, weight_b: Float, b: Floats) -> None:
    for j in range(width):
        total[j] += weight_a * a[j] + weight_b * b[j]


@_for_both_dtypes(
    lambda dtype: void(
        *[dtype[:, ::1]] * 3, *[int64[::1]] * 3, dtype[::1], *[dtype[:, ::1]] * 2, *[dtype[::1]] * 2, int64, int64
    ),
)
def feature_gradients(
    d_decoded: Floats,
    x: Floats,
    W_dec: Floats,
    active: Integers,
    starts: Integers,
    rows: Integers,
    values: Floats,
    d_encoder: Floats,
    d_decoder: Floats,
    d_bias: Floats,
    squares: Floats,
    lo: int,
    hi: int,
) -> None:
    """See ``kernels.feature_gradients``."""
    width, n_tokens = x.shape[1], x.shape[0]
    zero = d_bias.dtype.type(0)
    for i in range(lo, hi):
        weights, encoder, decoder = W_dec[active[i]], d_encoder[i], d_decoder[i]
        encoder[:] = 0
        decoder[:] = 0
        total, square = zero, zero
        e, stop = starts[i], starts[i + 1]
        # Two entries at a time: the sums, which are read and written for every entry, are so half as often.
        while e + 1 < stop:
            a, b = d_decoded[rows[e]], d_decoded[rows[e + 1]]
            da, db = _two_products(width, a, b, weights, zero)
            _add_two_(width, decoder, values[e], a, values[e + 1], b)
            _add_two_(width, encoder, da, x[rows[e] % n_tokens], db, x[rows[e + 1] % n_tokens])
            total += da + db
            e += 2
        if e < stop:
            a = d_decoded[rows[e]]
            da = _product(width, a, weights, zero)
            _add_(width, decoder, values[e], a)
            _add_(width, encoder, da, x[rows[e] % n_tokens])
            total += da
        for j in range(width):
            square += encoder[j] * encoder[j] + decoder[j] * decoder[j]
        d_bias[i] = total
        squares[i] = square + total * total


@_for_both_dtypes(
    lambda dtype: void(dtype[:, ::1], dtype[::1], *[dtype[:, ::1]] * 2, dtype[::1], dtype, int64, int64),
)
def squared_errors(
    decoded: Floats, bias: Floats, target: Floats, gradient: Floats, errors: Floats, scale: Float, lo: int, hi: int
) -> None:
    """See ``kernels.squared_errors_``."""
    for i in range(lo, hi):
        output, expected, slope = decoded[i], target[i], gradient[i]
        total = errors.dtype.type(0)
        for j in range(output.shape[0]):
            number = output[j] + bias[j]
            difference = number - expected[j]
            output[j] = number
            slope[j] = scale * difference
            total += difference * difference
        errors[i] = total


@_compiled(void(*[int64[::1]] * 5, int64, int64))
def sort_by_feature(
    features: Integers, row_starts: Integers, starts: Integers, order: Integers, rows: Integers, lo: int, hi: int
) -> None:
    """See ``kernels.sort_by_feature``. One thread does all of it (it has the only row, 0 to 1).

    A counting sort, in two passes over the entries, since features are small numbers; stable, so that the entries of
    a feature keep the order of their tokens and sums over them their bits.
    """
    for e in range(features.shape[0]):
        starts[features[e] + 2] += 1
    for f in range(2, starts.shape[0]):
        starts[f] += starts[f - 1]
    # starts[f + 1] is now where feature f begins, and moves on to where f + 1 does: at the end starts[f] is f's.
    for row in range(row_starts.shape[0] - 1):
        for e in range(row_starts[row], row_starts[row + 1]):
            place = starts[features[e] + 1]
            order[place], rows[place] = e, row
            starts[features[e] + 1] = place + 1


@_inlined
def _rotate_(values: Singles, block: int) -> None:
    """Multiply by a Hadamard matrix over ``block`` coordinates, each width / block apart; lengths grow by its root."""
    width = values.shape[0]
    # Neighbours ``distance`` apart and not next to each other, so that the inner loop runs over consecutive numbers.
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


@_inlined
def _largest_magnitude(values: Singles, maxima: Singles) -> np.float32:
    maxima[:] = 0
    for first in range(0, values.shape[0], maxima.shape[0]):
        part = values[first : first + maxima.shape[0]]
        for j in range(part.shape[0]):
            maxima[j] = abs(part[j]) if abs(part[j]) > maxima[j] else maxima[j]
    largest = np.float32(0)
    for j in range(maxima.shape[0]):
        largest = max(largest, maxima[j])
    return largest


@_compiled(
    void(
        *(float32[:, ::1], float32[::1], int64[::1]),
        *(int8[:, ::1], float32[::1], float32[::1], float32[::1]),
        *(int64, float32, int64, int64),
    )
)
def quantize_rows(
    table: Singles,
    scale: Singles,
    rows: Integers,
    codes: npt.NDArray[np.int8],
    steps: Singles,
    coded_lengths: Singles,
    residual_lengths: Singles,
    block: int,
    slack: np.float32,
    lo: int,
    hi: int,
) -> None:
    """See ``kernels.quantize_rows``."""
    width = table.shape[1]
    values, maxima = np.empty(width, np.float32), np.empty(_LANES, np.float32)
    normalization = np.float32(1 / math.sqrt(block))
    for i in range(lo, hi):
        row = rows[i]
        factor = scale[row] * normalization
        source, target = table[row], codes[row]
        for j in range(width):
            values[j] = source[j] * factor
        _rotate_(values, block)
        largest = _largest_magnitude(values, maxima)
        square = np.float32(0)
        for j in range(width):
            square += values[j] * values[j]
        step = largest / np.float32(127)
        # A row of (nearly) zeros has codes of zero: 127 / largest would not be finite.
        inverse = np.float32(127) / largest if largest > np.float32(1e-30) else np.float32(0)
        coded = np.float32(0)
        missed = np.float32(0)
        for j in range(width):
            code = np.rint(values[j] * inverse)
            target[j] = np.int8(code)
            coded += code * code
            missed += (values[j] - step * code) ** 2
        steps[row] = step
        coded_lengths[row] = step * math.sqrt(coded)
        residual_lengths[row] = math.sqrt(missed) + slack * math.sqrt(square)


@_inlined
def _fill_bounds(
    bounds: Singles,
    group_maxima: Singles,
    code_products: npt.NDArray[np.int32],
    token_terms: Singles,
    feature_terms: Singles,
    n_groups: int,
) -> None:
    """The bounds of a token, and the largest of each group."""
    d_sae = code_products.shape[0]
    group_maxima[:] = np.float32(-np.inf)
    t0, t1, t2 = token_terms[0], token_terms[1], token_terms[2]
    f0, f1, f2, f3 = feature_terms[0], feature_terms[1], feature_terms[2], feature_terms[3]
    for first in range(0, d_sae, n_groups):
        part = bounds[first : min(first + n_groups, d_sae)]
        sums, g0, g1, g2, g3 = code_products[first:], f0[first:], f1[first:], f2[first:], f3[first:]
        for j in range(part.shape[0]):
            part[j] = t0 * (g0[j] * np.float32(sums[j])) + g1[j] + t1 * g2[j] + t2 * g3[j]
        # A loop of its own: with more arrays in one the compiler makes no vectors, since there are too many pairs of
        # them that could overlap.
        for j in range(part.shape[0]):
            group_maxima[j] = part[j] if part[j] > group_maxima[j] else group_maxima[j]


@_inlined
def _fold_maxima(family_maxima: Singles, group_maxima: Singles, n_groups: int) -> None:
    n_families = family_maxima.shape[0]
    family_maxima[:] = np.float32(-np.inf)
    for first in range(0, n_groups, n_families):
        part = group_maxima[first : first + n_families]
        for j in range(n_families):
            family_maxima[j] = part[j] if part[j] > family_maxima[j] else family_maxima[j]


@_inlined
def _largest(numbers: Singles) -> int:
    at = 0
    for j in range(1, numbers.shape[0]):
        if numbers[j] > numbers[at]:
            at = j
    return at


@_inlined
def _take_largest(
    bounds: Singles, group_maxima: Singles, family_maxima: Singles, family: int, n_groups: int, lost: np.float32
) -> int:
    """The feature with the largest bound of a family, which is then marked as taken."""
    n_families = family_maxima.shape[0]
    group = family
    while group_maxima[group] != family_maxima[family]:
        group += n_families
    feature = group
    while bounds[feature] != group_maxima[group]:
        feature += n_groups
    bounds[feature] = lost
    largest = lost
    for j in range(group, n_groups * _GROUP, n_groups):
        largest = bounds[j] if bounds[j] > largest else largest
    group_maxima[group] = largest
    largest = lost
    for j in range(family, n_families * _GROUP, n_families):
        largest = group_maxima[j] if group_maxima[j] > largest else largest
    family_maxima[family] = largest
    return feature


@_inlined
def _four_products(products: Singles, row: Singles, table: Singles, picked: Integers, n_picked: int) -> None:
    for i in range(n_picked, picked.shape[0]):
        picked[i] = picked[0]
    a, b, c, d = table[picked[0]], table[picked[1]], table[picked[2]], table[picked[3]]
    sum_a, sum_b, sum_c, sum_d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for j in range(row.shape[0]):
        sum_a += row[j] * a[j]
        sum_b += row[j] * b[j]
        sum_c += row[j] * c[j]
        sum_d += row[j] * d[j]
    products[0], products[1], products[2], products[3] = sum_a, sum_b, sum_c, sum_d


@_inlined
def _replace_smallest(heap: Singles, features: Integers, score: np.float32, feature: int) -> None:
    """Put a score in the place of the smallest, which is the root: in a heap a parent is at most its children."""
    k = heap.shape[0]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= k:
            break
        if child + 1 < k and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= score:
            break
        heap[at], features[at] = heap[child], features[child]
        at = child
    heap[at], features[at] = score, feature


@_inlined
def _keep_largest(
    heap: Singles, features: Integers, products: Singles, picked: Integers, bias: Singles, scale: Singles
) -> bool:
    """Put scores into the heap that are larger than its smallest; whether all of them are numbers."""
    all_numbers = True
    for i in range(picked.shape[0]):
        score = (products[i] + bias[picked[i]]) * scale[picked[i]]
        if score > heap[0]:
            _replace_smallest(heap, features, score, picked[i])
        elif score != score:
            all_numbers = False
    return all_numbers


@_compiled(
    void(
        *(float32[:, ::1], float32[:, ::1], float32[::1], float32[::1]),
        *(float32[:, ::1], float32[:, ::1], int32[:, ::1]),
        *(float32[:, ::1], int64[:, ::1]),
        *(int64, int64, int64),
    )
)
def top_k_by_bounds(
    x: Singles,
    encoder_rows: Singles,
    bias: Singles,
    scale: Singles,
    token_terms: Singles,
    feature_terms: Singles,
    code_products: npt.NDArray[np.int32],
    scores: Singles,
    indices: Integers,
    max_scored: int,
    lo: int,
    hi: int,
) -> None:
    """See ``kernels.top_k_by_bounds``."""
    # Group g is every n_groups-th feature from g on, and a family every n_families-th group: members lie apart, so that
    # the maxima of all groups grow side by side, number by number, as vectors do.
    n_groups = (encoder_rows.shape[0] + _GROUP - 1) // _GROUP
    n_families = (n_groups + _GROUP - 1) // _GROUP
    lost = np.float32(-np.inf)
    bounds = np.full(n_groups * _GROUP, lost, np.float32)
    group_maxima = np.full(n_families * _GROUP, lost, np.float32)
    family_maxima = np.empty(n_families, np.float32)
    picked, products = np.empty(_ROWS_AT_ONCE, np.int64), np.empty(_ROWS_AT_ONCE, np.float32)
    for token in range(lo, hi):
        row, heap, features = x[token], scores[token], indices[token]
        heap[:] = lost
        features[:] = -1
        _fill_bounds(bounds, group_maxima, code_products[token], token_terms[:, token], feature_terms, n_groups)
        _fold_maxima(family_maxima, group_maxima, n_groups)
        n_scored, all_numbers = 0, True
        while True:
            n_picked = 0
            while n_picked < picked.shape[0]:
                family = _largest(family_maxima)
                if family_maxima[family] <= heap[0]:
                    break
                picked[n_picked] = _take_largest(bounds, group_maxima, family_maxima, family, n_groups, lost)
                n_picked += 1
            if n_picked == 0:
                break
            n_scored += n_picked
            if n_scored > max_scored:
                features[0] = -1
                break
            _four_products(products, row, encoder_rows, picked, n_picked)
            all_numbers &= _keep_largest(heap, features, products, picked[:n_picked], bias, scale)
        if not all_numbers:  # to be seen by the caller, as a token that is given up
            features[0] = -1
