"""Kernels of a TopK step on a GPU, compiled by Triton. For ``operators.py`` only; the twins say what each gives.

A program of a kernel owns what it writes: nothing is added by atomics, every sum has a fixed order, and two runs give
the same bits. Rows are addressed with 64-bit offsets: d_sae * d_in may pass 2^31.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelens_asi.sparse.fused_step import GROUP, TILE_OF_ENTRIES, ranks_groups

# Arguments stand in groups that belong together, a line for each.
# fmt: off

# Programs that share the features where something is added up over all of them.
PROGRAMS = 2048

# For programs of 16 warps that would take all registers of a multiprocessor: with half of them two are under way, and
# one reads while the other counts. No option of AMD's compiler.
_HALF_THE_REGISTERS = {} if torch.version.hip else {"maxnreg": 64}

_LOWEST = tl.constexpr(-(2**31))


def _warps(width: int) -> int:
    """For a row of so many numbers: about 8 in a thread."""
    return min(16, max(1, triton.next_power_of_2(width) // 256))


@triton.jit
def _ordered(scores):
    """int32 keys in the order of float32 scores; what is not a number is largest, as in ``topk``."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # the zero that is added makes a positive one of a negative one
    return tl.where(scores == scores, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _keys(
    products, bias, scale, row, columns, n_columns, stride, MAGNITUDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """What some columns are ranked by, and their scores."""
    inside = columns < n_columns
    scores = tl.load(products + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        scores += tl.load(bias + columns, mask=inside, other=0.0)
    if HAS_SCALE:
        scores *= tl.load(scale + columns, mask=inside, other=0.0)
    return tl.where(inside, _ordered(tl.abs(scores) if MAGNITUDE else scores), _LOWEST), scores


@triton.jit
def _threshold(keys, K: tl.constexpr):
    """The K-th largest key, bit by bit: the largest number that K keys reach."""
    threshold = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= K, 0, _LOWEST)
    for i in range(31):
        candidate = threshold + (1 << (30 - i))
        threshold = tl.where(tl.sum((keys >= candidate).to(tl.int32)) >= K, candidate, threshold)
    return threshold


@triton.jit
def _places(keys, threshold, n_ties):
    """Which keys are taken, and to which place each goes: those above the threshold, and the first ties."""
    above, ties = keys > threshold, keys == threshold
    # One running count of both: 16 bits for each are enough for 2^15 keys.
    counts = tl.cumsum(above.to(tl.int32) + (ties.to(tl.int32) << 16), 0)
    ties_here = (counts >> 16) & 0xFFFF
    taken = above | (ties & (ties_here <= n_ties))
    return taken, (counts & 0xFFFF) + tl.minimum(ties_here, n_ties) - 1


@triton.jit
def _select_groups(
    products, bias, scale, groups, n_columns, stride, K: tl.constexpr, MAGNITUDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, GROUP: tl.constexpr, N_GROUPS: tl.constexpr,
):
    """The K groups of consecutive columns with the largest maxima, among which the K largest scores are."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, N_GROUPS)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    keys, _ = _keys(products, bias, scale, row, columns, n_columns, stride, MAGNITUDE, HAS_BIAS, HAS_SCALE)
    largest = tl.max(keys, axis=1)
    threshold = _threshold(largest, K)
    n_ties = K - tl.sum((largest > threshold).to(tl.int32))
    taken, places = _places(largest, threshold, n_ties)
    tl.store(groups + row * K + places, group, mask=taken)


@triton.jit
def _columns_of(places, groups, row, n_places, K: tl.constexpr, HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr):
    columns = places
    if HAS_GROUPS:
        columns = tl.load(groups + row * K + places // GROUP, mask=places < n_places, other=0) * GROUP + places % GROUP
    return columns


@triton.jit
def _select_top_k(
    products, bias, scale, groups, best, best_columns, n_columns, n_places, first_column, stride,
    K: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):
    """The K largest scores of all columns, or of those in the groups."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    columns = _columns_of(places, groups, row, n_places, K, HAS_GROUPS, GROUP)
    keys, scores = _keys(products, bias, scale, row, columns, n_columns, stride, MAGNITUDE, HAS_BIAS, HAS_SCALE)
    keys = tl.where(places < n_places, keys, _LOWEST)
    threshold = _threshold(keys, K)
    n_ties = K - tl.sum((keys > threshold).to(tl.int32))
    taken, to = _places(keys, threshold, n_ties)
    tl.store(best + row * K + to, scores, mask=taken)
    tl.store(best_columns + row * K + to, (columns + first_column).to(tl.int64), mask=taken)


def select_top_k(
    products: Tensor, bias: Tensor | None, scale: Tensor | None, k: int, magnitude: bool, first: int
) -> tuple[Tensor, Tensor]:
    n_rows, n_columns = products.shape
    best = products.new_empty(n_rows, k, dtype=torch.float32)
    columns = products.new_empty(n_rows, k, dtype=torch.int64)
    options = {"K": k, "MAGNITUDE": magnitude, "HAS_BIAS": bias is not None, "HAS_SCALE": scale is not None}
    bias, scale = products if bias is None else bias, products if scale is None else scale
    n_places, groups = n_columns, columns
    has_groups = ranks_groups(n_columns, k)
    if has_groups:
        n_places, groups = k * GROUP, products.new_empty(n_rows, k, dtype=torch.int32)
        n_groups = triton.next_power_of_2(triton.cdiv(n_columns, GROUP))
        _select_groups[(n_rows,)](
            products, bias, scale, groups, n_columns, products.stride(0), **options, GROUP=GROUP,
            N_GROUPS=n_groups, num_warps=min(16, max(4, n_groups // 256)), **_HALF_THE_REGISTERS,
        )
    block = triton.next_power_of_2(n_places)
    _select_top_k[(n_rows,)](
        products, bias, scale, groups, best, columns, n_columns, n_places, first, products.stride(0), **options,
        HAS_GROUPS=has_groups, GROUP=GROUP, BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )
    return best, columns


@triton.jit
def _value(score, feature, scale, mask, MAGNITUDE: tl.constexpr, HAS_SCALE: tl.constexpr):
    """By how much a feature counts in the decoder, and whether it does."""
    # Not "> 0": a score that is not a number stays, and shows in the loss.
    active = (score != 0.0) if MAGNITUDE else ((score > 0.0) | (score != score))
    value = score
    if HAS_SCALE:
        value /= tl.load(scale + feature, mask=mask, other=1.0)
    return tl.where(active, value, 0.0), active


@triton.jit
def _decode_tokens(
    scores, features, scale, W_dec, b_dec, target, out, d_out, errors, acts, values, d_values, owners, factor,
    d_in, d_sae, K: tl.constexpr, K_BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, K_BLOCK)
    real = slots < K
    score = tl.load(scores + token * K + slots, mask=real, other=0.0)
    feature = tl.load(features + token * K + slots, mask=real, other=0)
    value, active = _value(score, feature, scale, real, MAGNITUDE, HAS_SCALE)
    tl.store(acts + token * K + slots, tl.where(active, score, 0.0), mask=real)
    tl.store(values + token * K + slots, value, mask=real)
    tl.store(owners + token * K + slots, tl.where(active, feature, d_sae).to(tl.int32), mask=real)
    d_value = tl.zeros([K_BLOCK], tl.float32)
    error = 0.0
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < d_in
        decoded = tl.load(b_dec + columns, mask=inside, other=0.0)
        for j in tl.range(0, K, loop_unroll_factor=4):
            one = tl.load(features + token * K + j)
            weight, _ = _value(tl.load(scores + token * K + j), one, scale, True, MAGNITUDE, HAS_SCALE)
            decoded += weight * tl.load(W_dec + one * d_in + columns, mask=inside, other=0.0)
        difference = decoded - tl.load(target + token * d_in + columns, mask=inside, other=0.0)
        difference = tl.where(inside, difference, 0.0)
        error += tl.sum(difference * difference)
        tl.store(out + token * d_in + columns, decoded, mask=inside)
        tl.store(d_out + token * d_in + columns, factor * difference, mask=inside)
        for j in range(K):
            row = tl.load(features + token * K + j) * d_in
            product = tl.sum(factor * difference * tl.load(W_dec + row + columns, mask=inside, other=0.0))
            d_value += tl.where(slots == j, product, 0.0)
    tl.store(errors + token, error)
    tl.store(d_values + token * K + slots, tl.where(active, d_value, 0.0), mask=real)


def decode_tokens(
    scores: Tensor, features: Tensor, scale: Tensor | None, W_dec: Tensor, b_dec: Tensor, target: Tensor,
    magnitude: bool,
) -> tuple[Tensor, ...]:
    (n_tokens, k), (d_sae, d_in) = scores.shape, W_dec.shape
    out, d_out, errors = torch.empty_like(target), torch.empty_like(target), target.new_empty(n_tokens)
    acts, values, d_values = (torch.empty_like(scores) for _ in range(3))
    owners = torch.empty_like(features, dtype=torch.int32)
    _decode_tokens[(n_tokens,)](
        scores, features, scores if scale is None else scale, W_dec, b_dec, target, out, d_out, errors, acts,
        values, d_values, owners, 2 / n_tokens, d_in, d_sae, K=k, K_BLOCK=triton.next_power_of_2(k),
        MAGNITUDE=magnitude, HAS_SCALE=scale is not None, BLOCK=min(1024, triton.next_power_of_2(d_in)),
        num_warps=4,
    )
    return out, d_out, errors, acts, values, d_values, owners


@triton.jit
def _sum_entries(
    first, stop, order, values, d_values, d_out, x, columns, inside, d_in, d_decoder, d_encoder, d_bias, K: tl.constexpr
):
    """Add entries, in the order of features, to the gradients of a row."""
    for entry in tl.range(first, stop, loop_unroll_factor=4):
        position = tl.load(order + entry)
        row = (position // K) * d_in
        d_value = tl.load(d_values + position)
        d_decoder += tl.load(values + position) * tl.load(d_out + row + columns, mask=inside, other=0.0)
        d_encoder += d_value * tl.load(x + row + columns, mask=inside, other=0.0)
        d_bias += d_value
    return d_decoder, d_encoder, d_bias


@triton.jit
def _row_gradients(
    start, stop, order, values, d_values, d_out, x, tile_rows, tile_bias, columns, inside, d_in,
    K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Of a feature with the entries ``start`` to ``stop``: what is before its whole tiles, these, what is after."""
    zero = tl.zeros([BLOCK], tl.float32)
    first_tile, last_tile = (start + TILE - 1) // TILE, stop // TILE
    has_tiles = last_tile > first_tile
    last_tile = tl.where(has_tiles, last_tile, first_tile)
    head, tail = tl.where(has_tiles, first_tile * TILE, stop), tl.where(has_tiles, last_tile * TILE, stop)
    d_decoder, d_encoder, d_bias = _sum_entries(
        start, head, order, values, d_values, d_out, x, columns, inside, d_in, zero, zero, tl.sum(zero), K
    )
    for tile in range(first_tile, last_tile):
        d_decoder += tl.load(tile_rows + 2 * tile * d_in + columns, mask=inside, other=0.0)
        d_encoder += tl.load(tile_rows + (2 * tile + 1) * d_in + columns, mask=inside, other=0.0)
        d_bias += tl.load(tile_bias + tile)
    return _sum_entries(
        tail, stop, order, values, d_values, d_out, x, columns, inside, d_in, d_decoder, d_encoder, d_bias, K
    )


@triton.jit
def _sum_tiles(
    owners, order, values, d_values, d_out, x, tile_rows, tile_bias, d_in, d_sae, K: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    first = tile * TILE
    owner = tl.load(owners + first)
    is_whole = (owner == tl.load(owners + first + TILE - 1)) & (owner < d_sae)
    zero = tl.zeros([BLOCK], tl.float32)
    d_decoder, d_encoder, d_bias = _sum_entries(
        first, tl.where(is_whole, first + TILE, first), order, values, d_values, d_out, x, columns, inside,
        d_in, zero, zero, tl.sum(zero), K,
    )
    tl.store(tile_rows + 2 * tile * d_in + columns, d_decoder, mask=inside)
    tl.store(tile_rows + (2 * tile + 1) * d_in + columns, d_encoder, mask=inside)
    tl.store(tile_bias + tile, d_bias)


def sum_tiles(
    owners: Tensor, order: Tensor, values: Tensor, d_values: Tensor, d_out: Tensor, x: Tensor, d_sae: int
) -> tuple[Tensor, Tensor]:
    n_tiles, d_in = owners.numel() // TILE_OF_ENTRIES, x.shape[1]
    tile_rows, tile_bias = x.new_empty(n_tiles, 2, d_in), x.new_empty(n_tiles)
    if n_tiles:
        _sum_tiles[(n_tiles,)](
            owners, order, values, d_values, d_out, x, tile_rows, tile_bias, d_in, d_sae, K=values.shape[1],
            TILE=TILE_OF_ENTRIES, BLOCK=triton.next_power_of_2(d_in), num_warps=_warps(d_in),
        )
    return tile_rows, tile_bias


@triton.jit
def _gradient_squares(
    starts, order, values, d_values, d_out, x, tile_rows, tile_bias, W_enc, squares, d_input, d_in, d_sae,
    n_features, K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    total = tl.zeros([], tl.float32)
    reaching = tl.zeros([BLOCK], tl.float32)
    for feature in range(program * n_features, tl.minimum((program + 1) * n_features, d_sae)):
        start, stop = tl.load(starts + feature), tl.load(starts + feature + 1)
        if stop > start:
            d_decoder, d_encoder, d_bias = _row_gradients(
                start, stop, order, values, d_values, d_out, x, tile_rows, tile_bias, columns, inside, d_in, K,
                TILE, BLOCK,
            )
            total += tl.sum(d_decoder * d_decoder + d_encoder * d_encoder) + d_bias * d_bias
            reaching += d_bias * tl.load(W_enc + feature * d_in + columns, mask=inside, other=0.0)
    tl.store(squares + program, total)
    tl.store(d_input + program * d_in + columns, reaching, mask=inside)


def gradient_squares(
    starts: Tensor, order: Tensor, values: Tensor, d_values: Tensor, d_out: Tensor, x: Tensor,
    tile_rows: Tensor, tile_bias: Tensor, W_enc: Tensor,
) -> tuple[Tensor, Tensor]:
    d_sae, d_in = W_enc.shape
    n_features = triton.cdiv(d_sae, PROGRAMS)
    n_programs = triton.cdiv(d_sae, n_features)
    squares, d_input = x.new_empty(n_programs), x.new_empty(n_programs, d_in)
    _gradient_squares[(n_programs,)](
        starts, order, values, d_values, d_out, x, tile_rows, tile_bias, W_enc, squares, d_input, d_in, d_sae,
        n_features, K=values.shape[1], TILE=TILE_OF_ENTRIES, BLOCK=triton.next_power_of_2(d_in), num_warps=_warps(d_in),
    )
    return squares, d_input


@triton.jit
def _clip(squares, d_b_dec, d_input, gradient, norm, divisor, max_norm, n, d_in, N: tl.constexpr, BLOCK: tl.constexpr):
    parts, columns = tl.arange(0, N), tl.arange(0, BLOCK)
    inside = columns < d_in
    whole = tl.load(d_b_dec + columns, mask=inside, other=0.0) - tl.load(d_input + columns, mask=inside, other=0.0)
    total = tl.sum(tl.load(squares + parts, mask=parts < n, other=0.0).to(tl.float64))
    total = tl.sqrt(total + tl.sum(whole.to(tl.float64) * whole.to(tl.float64)))
    by = ((total + 1e-6) / max_norm).to(tl.float32)
    by = tl.where(by < 1.0, 1.0, by)  # a norm that is not a number stays one
    tl.store(norm, total)
    tl.store(divisor, by)
    tl.store(gradient + columns, whole / by, mask=inside)


def clip(squares: Tensor, d_b_dec: Tensor, d_input: Tensor, max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    n, d_in = squares.numel(), d_b_dec.numel()
    gradient, norm = torch.empty_like(d_b_dec), squares.new_empty((), dtype=torch.float64)
    divisor = squares.new_empty(())
    _clip[(1,)](
        squares, d_b_dec, d_input, gradient, norm, divisor, max_norm, n, d_in, N=triton.next_power_of_2(n),
        BLOCK=triton.next_power_of_2(d_in), num_warps=8,
    )
    return gradient, norm, divisor


@triton.jit
def _adam(
    param, exp_avg, exp_avg_sq, offsets, mask, gradient,
    step_size, root_scale, beta1, one_less_beta1, beta2, one_less_beta2, eps,
):
    first = beta1 * tl.load(exp_avg + offsets, mask=mask, other=0.0) + one_less_beta1 * gradient
    second = beta2 * tl.load(exp_avg_sq + offsets, mask=mask, other=0.0) + one_less_beta2 * gradient * gradient
    moved = tl.load(param + offsets, mask=mask, other=0.0)
    moved -= step_size * first / (tl.sqrt_rn(second) * root_scale + eps)
    tl.store(exp_avg + offsets, first, mask=mask)
    tl.store(exp_avg_sq + offsets, second, mask=mask)
    tl.store(param + offsets, moved, mask=mask)


@triton.jit
def _move_rows(
    W_enc, b_enc, W_dec, W_enc_exp_avg, b_enc_exp_avg, W_dec_exp_avg, W_enc_exp_avg_sq, b_enc_exp_avg_sq,
    W_dec_exp_avg_sq, starts, order, values, d_values, d_out, x, tile_rows, tile_bias, divisor, d_in, step_size,
    root_scale, beta1, one_less_beta1, beta2, one_less_beta2, eps, K: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    feature = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(starts + feature), tl.load(starts + feature + 1)
    if stop > start:
        columns = tl.arange(0, BLOCK)
        inside = columns < d_in
        d_decoder, d_encoder, d_bias = _row_gradients(
            start, stop, order, values, d_values, d_out, x, tile_rows, tile_bias, columns, inside, d_in, K, TILE, BLOCK
        )
        by = tl.load(divisor)
        row = feature * d_in + columns
        _adam(
            W_dec, W_dec_exp_avg, W_dec_exp_avg_sq, row, inside, d_decoder / by,
            step_size, root_scale, beta1, one_less_beta1, beta2, one_less_beta2, eps,
        )
        _adam(
            W_enc, W_enc_exp_avg, W_enc_exp_avg_sq, row, inside, d_encoder / by,
            step_size, root_scale, beta1, one_less_beta1, beta2, one_less_beta2, eps,
        )
        _adam(
            b_enc, b_enc_exp_avg, b_enc_exp_avg_sq, feature, True, d_bias / by,
            step_size, root_scale, beta1, one_less_beta1, beta2, one_less_beta2, eps,
        )


def move_rows_(
    tensors: list[Tensor], starts: Tensor, order: Tensor, values: Tensor, d_values: Tensor, d_out: Tensor,
    x: Tensor, tile_rows: Tensor, tile_bias: Tensor, divisor: Tensor, numbers: list[float],
) -> None:
    d_in = x.shape[1]
    step_size, root_scale, beta1, beta2, eps = numbers
    _move_rows[(starts.numel() - 1,)](
        *tensors, starts, order, values, d_values, d_out, x, tile_rows, tile_bias, divisor, d_in, step_size,
        root_scale, beta1, 1 - beta1, beta2, 1 - beta2, eps, K=values.shape[1], TILE=TILE_OF_ENTRIES,
        BLOCK=triton.next_power_of_2(d_in), num_warps=_warps(d_in),
    )


@triton.jit
def _move_vector(
    param, exp_avg, exp_avg_sq, gradient, n, step_size, root_scale, beta1, one_less_beta1, beta2,
    one_less_beta2, eps, BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    here = tl.load(gradient + offsets, mask=mask, other=0.0)
    _adam(
        param, exp_avg, exp_avg_sq, offsets, mask, here,
        step_size, root_scale, beta1, one_less_beta1, beta2, one_less_beta2, eps,
    )


def move_vector_(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, numbers: list[float]) -> None:
    step_size, root_scale, beta1, beta2, eps = numbers
    _move_vector[(triton.cdiv(param.numel(), 256),)](
        param, exp_avg, exp_avg_sq, gradient, param.numel(), step_size, root_scale, beta1, 1 - beta1, beta2,
        1 - beta2, eps, BLOCK=256,
    )


@triton.jit
def _renew_norms(norms, table, starts, d_in, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(starts + row + 1) > tl.load(starts + row):
        columns = tl.arange(0, BLOCK)
        numbers = tl.load(table + row * d_in + columns, mask=columns < d_in, other=0.0)
        tl.store(norms + row, tl.sqrt_rn(tl.sum(numbers * numbers)))


def renew_norms_(norms: Tensor, table: Tensor, starts: Tensor) -> None:
    n, d_in = table.shape
    _renew_norms[(n,)](norms, table, starts, d_in, BLOCK=triton.next_power_of_2(d_in), num_warps=_warps(d_in))


@triton.jit
def _is_finite(numbers):
    if numbers.dtype.primitive_bitwidth < 32:
        return tl.abs(numbers.to(tl.float32)) < float("inf")
    else:
        return tl.abs(numbers) < float("inf")


@triton.jit
def _find_finite_rows(x, good, d_in, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n_bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        numbers = tl.load(x + row * d_in + columns, mask=columns < d_in, other=0.0)
        n_bad += 1 - _is_finite(numbers).to(tl.int32)
    tl.store(good + row, tl.sum(n_bad) == 0)


@triton.jit
def _replace_bad_rows(x, good, out, n_rows, d_in, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source, weight = row, 1.0
    if tl.load(good + row) == 0:
        rows = tl.arange(0, N)
        flags = tl.load(good + rows, mask=rows < n_rows, other=0).to(tl.int32)
        n_good = tl.sum(flags)
        turn = row - tl.sum(tl.where(rows < row, flags, 0))
        turn %= tl.maximum(n_good, 1)
        is_it = (flags == 1) & (tl.cumsum(flags, 0) == turn + 1)
        source = tl.sum(tl.where(is_it, rows, 0)).to(tl.int64)
        weight = tl.where(n_good > 0, 1.0, 0.0)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < d_in
        numbers = tl.load(x + source * d_in + columns, mask=inside, other=0.0)
        tl.store(out + row * d_in + columns, tl.where(weight > 0, numbers, 0.0), mask=inside)


def keep_finite_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    n_rows, d_in = x.shape
    out, good = torch.empty_like(x), x.new_empty(n_rows, dtype=torch.bool)
    block = min(1024, triton.next_power_of_2(d_in))
    if x.numel():
        _find_finite_rows[(n_rows,)](x, good, d_in, BLOCK=block)
        n = triton.next_power_of_2(n_rows)
        _replace_bad_rows[(n_rows,)](
            x, good, out, n_rows, d_in, N=n, BLOCK=block, num_warps=min(16, max(4, n // 1024))
        )
    return out, good


@triton.jit
def _note(counts, loss, good, n, N: tl.constexpr):
    rows = tl.arange(0, N)
    n_bad = tl.sum(1 - tl.load(good + rows, mask=rows < n, other=1).to(tl.int32))
    is_bad = 1 - _is_finite(tl.load(loss)).to(tl.int64)
    tl.store(counts, tl.load(counts) + is_bad)
    tl.store(counts + 1, tl.load(counts + 1) + n_bad.to(tl.int64))


def note_(counts: Tensor, loss: Tensor, good: Tensor) -> None:
    n = triton.next_power_of_2(max(1, good.numel()))
    _note[(1,)](counts, loss, good, good.numel(), N=n, num_warps=min(16, max(4, n // 1024)))


@functools.cache
def kernels() -> dict[str, Any]:
    """All kernels by name, for tests that compile them for cards that are not there."""
    return {name: value for name, value in globals().items() if isinstance(value, triton.runtime.JITFunction)}
