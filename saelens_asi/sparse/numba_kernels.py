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
from numba import boolean, float32, float64, int8, int32, int64, njit, void
from numba.core.types import Tuple, Type
from numba.core.typing.templates import Signature

Floats: TypeAlias = npt.NDArray[np.float32 | np.float64]
Float: TypeAlias = np.float32 | np.float64
Singles: TypeAlias = npt.NDArray[np.float32]
Integers: TypeAlias = npt.NDArray[np.int64]

_Function = TypeVar("_Function", bound=Callable[..., object])

# Sums may be taken in the order that suits vectors (reassoc, contract, nsz). Not nnan and not ninf: with them the
# compiler may assume that no number is NaN or infinite, but a training step must show where one is.
FASTMATH = {"reassoc", "contract", "nsz"}

# Exact scores are taken so many at a time: a product with a row of the encoder waits for memory, and the four requests
# are under way together.
_ROWS_AT_ONCE = 4

# Lanes of a maximum. One running maximum is not made vectors (its order matters where numbers may be NaN), 128 are.
_LANES = 128


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
def _fill_upper_bounds(
    upper: Singles,
    products: npt.NDArray[np.float32 | np.int32],
    features: tuple[Singles, Singles, Singles, Singles],
    token: tuple[np.float32, np.float32, np.float32],
    pad: np.float32,
    magnitude: bool,
) -> None:
    f0, f1, f2, f3 = features
    t0, t1, t2 = token
    if magnitude:
        for j in range(upper.shape[0]):
            middle = abs(t0 * (f0[j] * np.float32(products[j])) + f1[j])
            upper[j] = middle + t1 * f2[j] + t2 * f3[j] + pad
    else:
        for j in range(upper.shape[0]):
            middle = t0 * (f0[j] * np.float32(products[j])) + f1[j]
            upper[j] = middle + t1 * f2[j] + t2 * f3[j] + pad


@_inlined
def _fold_maxima(maxima: Singles, numbers: Singles) -> None:
    """Lane j gets the largest of every ``len(maxima)``-th number from j on: as vectors, which one maximum is not."""
    maxima[:] = np.float32(-np.inf)
    for first in range(0, numbers.shape[0], maxima.shape[0]):
        part = numbers[first : first + maxima.shape[0]]
        for j in range(part.shape[0]):
            maxima[j] = part[j] if part[j] > maxima[j] else maxima[j]


@_inlined
def _raise_smallest(heap: Singles, number: np.float32) -> None:
    """Put a number in the place of the smallest, which is the root: in a heap a parent is at most its children."""
    k = heap.shape[0]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= k:
            break
        if child + 1 < k and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= number:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = number


@_inlined
def _just_below(number: np.float32) -> np.float32:
    """Bounds that equal this number exceed it: a score that ties with the k-th best is a candidate."""
    return number - abs(number) * np.float32(1e-6) - np.float32(1e-30)


@_inlined
def _first_cut(
    upper: Singles,
    features: tuple[Singles, Singles, Singles, Singles],
    token: tuple[np.float32, np.float32, np.float32],
    pad: np.float32,
    share: np.float32,
    maxima: Singles,
    heap: Singles,
) -> np.float32:
    """A number that k scores are likely to reach: the k-th largest of the lanes' largest likely scores."""
    f2, f3 = features[2], features[3]
    maxima[:] = np.float32(-np.inf)
    n_lanes = maxima.shape[0]
    likely = np.empty(n_lanes, np.float32)
    for first in range(0, upper.shape[0], n_lanes):
        part = upper[first : first + n_lanes]
        g2, g3 = f2[first:], f3[first:]
        for j in range(part.shape[0]):
            likely[j] = part[j] - share * (token[1] * g2[j] + token[2] * g3[j] + pad)
        for j in range(part.shape[0]):
            maxima[j] = likely[j] if likely[j] > maxima[j] else maxima[j]
    heap[:] = np.float32(-np.inf)
    for j in range(n_lanes):
        if maxima[j] > heap[0]:
            _raise_smallest(heap, maxima[j])
    return _just_below(heap[0])


@_inlined
def _drop_below(cut: np.float32, found: npt.NDArray[np.int32], upper: Singles, likely: Singles) -> int:
    """Keep the candidates whose upper bound exceeds the cut; their number."""
    n = 0
    for i in range(found.shape[0]):
        if upper[i] > cut:
            found[n], upper[n], likely[n] = found[i], upper[i], likely[i]
            n += 1
    return n


@_inlined
def _lanes_above(cut: np.float32, maxima: Singles, lanes: Integers) -> int:
    n_lanes = 0
    for j in range(maxima.shape[0]):  # without a branch, which would be guessed wrong
        lanes[n_lanes] = j
        n_lanes += maxima[j] > cut
    return n_lanes


@_compiled(
    Tuple((int64, float32))(  # type: ignore[no-untyped-call]
        *(int64[::1], int64, *[float32[::1]] * 3, *[float32] * 4),
        *(int64, float32, float32[::1], int32[::1], float32[::1], float32[::1]),
    )
)
def _take_candidates(
    lanes: Integers,
    first: int,
    all_upper: Singles,
    f2: Singles,
    f3: Singles,
    t1: np.float32,
    t2: np.float32,
    pad: np.float32,
    share: np.float32,
    n: int,
    cut: np.float32,
    best: Singles,
    found: npt.NDArray[np.int32],
    upper_bounds: Singles,
    likely_scores: Singles,
) -> tuple[int, np.float32]:
    """Add the candidates of some lanes; returns their number, too large for a token that is given up, and the cut.

    Compiled by itself: inlined, it costs the loops around it their vectors.
    """
    capacity = found.shape[0]
    for at in range(lanes.shape[0]):
        for j in range(lanes[at], all_upper.shape[0], _LANES):
            upper = all_upper[j]
            if not upper > cut:
                continue
            if n == capacity:
                n = _drop_below(cut, found, upper_bounds, likely_scores)
            if n >= capacity:
                return capacity + 1, cut
            likely = upper - share * (t1 * f2[j] + t2 * f3[j] + pad)
            found[n], upper_bounds[n], likely_scores[n] = first + j, upper, likely
            n += 1
            if likely > best[0]:
                _raise_smallest(best, likely)
                cut = max(cut, _just_below(best[0]))
    return n, cut


def _gather_signature(products: Type) -> Signature:
    return void(
        *(float32[:, ::1], float32[:, ::1], products[:, ::1]),
        *(float32[:, ::1], float32[::1], int64[::1], int32[:, ::1], float32[:, ::1], float32[:, ::1]),
        *(int64, int64, float32, float32, int64, int64),
    )


@_compiled(_gather_signature(float32), _gather_signature(int32))
def gather_candidates(
    token_terms: Singles,
    feature_terms: Singles,
    products: npt.NDArray[np.float32 | np.int32],
    best_likely: Singles,
    cuts: Singles,
    n_found: Integers,
    found: npt.NDArray[np.int32],
    upper_bounds: Singles,
    likely_scores: Singles,
    first: int,
    magnitude: int,
    pad: np.float32,
    share: np.float32,
    lo: int,
    hi: int,
) -> None:
    """See ``kernels.gather_candidates``."""
    n_features, capacity = products.shape[1], found.shape[1]
    f0, f1, f2, f3 = feature_terms[0], feature_terms[1], feature_terms[2], feature_terms[3]
    features = (f0[first:], f1[first:], f2[first:], f3[first:])
    all_upper, maxima, heap = np.empty(n_features, np.float32), np.empty(_LANES, np.float32), best_likely[0].copy()
    lanes = np.empty(_LANES, np.int64)
    for i in range(lo, hi):
        n, cut = n_found[i], cuts[i]
        if n > capacity:
            continue
        token = (token_terms[0, i], token_terms[1, i], token_terms[2, i])
        _fill_upper_bounds(all_upper, products[i], features, token, pad, magnitude != 0)
        if first == 0 and heap.shape[0] <= _LANES // 2:
            cut = max(cut, _first_cut(all_upper, features, token, pad, share, maxima, heap))
        _fold_maxima(maxima, all_upper)
        reaching = lanes[: _lanes_above(cut, maxima, lanes)]
        n_found[i], cuts[i] = _take_candidates(
            *(reaching, first, all_upper, *features[2:], token[1], token[2], pad, share),
            *(n, cut, best_likely[i], found[i], upper_bounds[i], likely_scores[i]),
        )


@_inlined
def _precedes(score: np.float32, feature: int, other: np.float32, other_feature: int, magnitude: bool) -> bool:
    """Whether a score ranks before another: the larger, and of equal ones that of the feature with the lower number."""
    a, b = (abs(score), abs(other)) if magnitude else (score, other)
    return bool(a > b or (a == b and feature < other_feature))


@_inlined
def _replace_last(scores: Singles, features: Integers, score: np.float32, feature: int, magnitude: bool) -> None:
    """Put a score in the place of the last in rank, which is the root: in a heap a parent ranks after its children."""
    k = scores.shape[0]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= k:
            break
        if child + 1 < k and _precedes(
            scores[child], features[child], scores[child + 1], features[child + 1], magnitude
        ):
            child += 1
        if not _precedes(score, feature, scores[child], features[child], magnitude):
            break
        scores[at], features[at] = scores[child], features[child]
        at = child
    scores[at], features[at] = score, feature


@_inlined
def _sort_by_feature(scores: Singles, features: Integers) -> None:
    """In place (a shell sort, with the gaps of Ciura): sums over a token's features are then of one order."""
    for gap in (701, 301, 132, 57, 23, 10, 4, 1):
        for i in range(gap, features.shape[0]):
            score, feature = scores[i], features[i]
            at = i
            while at >= gap and features[at - gap] > feature:
                scores[at], features[at] = scores[at - gap], features[at - gap]
                at -= gap
            scores[at], features[at] = score, feature


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


@_compiled(
    Tuple((int64, int64))(int64[::1], int64, int32[::1], *[float32[::1]] * 2, *[float32] * 2, boolean)  # type: ignore[no-untyped-call]
)
def _pick(
    picked: Integers,
    at: int,
    found: npt.NDArray[np.int32],
    upper_bounds: Singles,
    likely_scores: Singles,
    cut: np.float32,
    reach: np.float32,
    likely: bool,
) -> tuple[int, int]:
    """The next candidates from position ``at`` on to be scored; where to go on, and how many they are.

    Of those that are likely to reach the cut all are taken, of the others those whose bound comes to ``reach``.
    """
    n_picked = 0
    while at < found.shape[0] and n_picked < picked.shape[0]:
        if (likely_scores[at] > cut) == likely and (likely or upper_bounds[at] >= reach):
            picked[n_picked] = found[at]
            n_picked += 1
        at += 1
    return at, n_picked


@_compiled(
    void(
        *(float32[:, ::1], float32[:, ::1], float32[::1], float32[::1]),
        *(float32[::1], int64[::1], int32[:, ::1], float32[:, ::1], float32[:, ::1]),
        *(float32[:, ::1], int64[:, ::1], int64[::1]),
        *(int64, int64, int64),
    )
)
def best_of_candidates(
    x: Singles,
    encoder_rows: Singles,
    bias: Singles,
    scale: Singles,
    cuts: Singles,
    n_found: Integers,
    found: npt.NDArray[np.int32],
    upper_bounds: Singles,
    likely_scores: Singles,
    scores: Singles,
    indices: Integers,
    n_scored: Integers,
    magnitude: int,
    lo: int,
    hi: int,
) -> None:
    """See ``kernels.best_of_candidates``."""
    picked, products = np.empty(_ROWS_AT_ONCE, np.int64), np.empty(_ROWS_AT_ONCE, np.float32)
    by_magnitude = magnitude != 0
    for i in range(lo, hi):
        n_scored[i] = 0
        if n_found[i] > found.shape[1]:
            n_scored[i] = -1
            continue
        best, features, row, all_numbers = scores[i], indices[i], x[i], True
        # Those that are likely the best come first: after them few others reach the k-th best.
        for likely in (True, False):
            at = 0
            while True:
                reach = abs(best[0]) if by_magnitude else best[0]
                at, n_picked = _pick(
                    picked, at, found[i, : n_found[i]], upper_bounds[i], likely_scores[i], cuts[i], reach, likely
                )
                if n_picked == 0:
                    break
                n_scored[i] += n_picked
                _four_products(products, row, encoder_rows, picked, n_picked)
                for p in range(n_picked):
                    feature = picked[p]
                    score = (products[p] + bias[feature]) * scale[feature]
                    if _precedes(score, feature, best[0], features[0], by_magnitude):
                        _replace_last(best, features, score, feature, by_magnitude)
                    elif score != score:
                        all_numbers = False
        k_th = abs(best[0]) if by_magnitude else best[0]
        if not all_numbers or k_th < cuts[i]:  # given up: what did not reach the cut could be among the best
            n_scored[i] = -1
        _sort_by_feature(best, features)
