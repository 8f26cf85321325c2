"""Kernels of a TopK step on a GPU, compiled by Triton. For ``operators.py`` only; the twins say what each gives.

A program of a kernel owns what it writes: nothing is added by atomics, every sum has a fixed order, and two runs give
the same bits. Rows are addressed with 64-bit offsets: d_sae * d_in may pass 2^31.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelens_asi.sparse.fused_step import TILE_OF_ENTRIES
from saelens_asi.sparse.fused_topk import parts_of_selection

# Arguments stand in groups that belong together, a line for each.
# fmt: off

# Programs that share the features where something is added up over all of them.
PROGRAMS = 2048

# Entries of one tile of the second product, which the tokens of a group fill on average at 131,072 features.
ENTRIES = 32

# Columns of a row whose gradients are made together: those of twice as many do not fit the registers.
MAX_COLUMNS = 4096

# Rows that a program looks at together for those that are not finite.
MAX_FLAGS = 2048

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
def _keys(numbers, places, last, MAGNITUDE: tl.constexpr):
    """What the numbers before the last one are ranked by."""
    scores = tl.load(numbers + places, mask=places < last, other=0.0)
    return tl.where(places < last, _ordered(tl.abs(scores) if MAGNITUDE else scores), _LOWEST)


@triton.jit
def _threshold(keys, K: tl.constexpr):
    """The K-th largest key, bit by bit: the largest number that K keys reach."""
    threshold = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= K, 0, _LOWEST)
    for i in range(31):
        candidate = threshold + (1 << (30 - i))
        threshold = tl.where(tl.sum((keys >= candidate).to(tl.int32)) >= K, candidate, threshold)
    return threshold


@triton.jit
def _select_top_k(
    numbers, groups, best, best_columns, n, n_groups, width, K: tl.constexpr, MAGNITUDE: tl.constexpr,
    HAS_GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):
    """The K largest of ``width`` numbers of a row: of those with the smallest key, the first ones."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = part * width, tl.minimum((part + 1) * width, n)
    numbers += row * n
    keys = _keys(numbers, first + tl.arange(0, BLOCK), last, MAGNITUDE)
    threshold = _threshold(keys, K)
    n_ties = K - tl.sum((keys > threshold).to(tl.int32))
    to = (row * tl.num_programs(1) + part) * K
    # By pieces, which are read again: running counts of all would not fit the registers beside the keys.
    n_above, n_equal = 0, 0
    for start in range(first, last, PIECE):
        places = start + tl.arange(0, PIECE)
        here = _keys(numbers, places, last, MAGNITUDE)
        above, equal = here > threshold, here == threshold
        # One running count of both: 16 bits for each are enough for 2^15 keys.
        counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        up_to_here = n_equal + (counts >> 16)
        taken = above | (equal & (up_to_here <= n_ties))
        at = to + n_above + (counts & 0xFFFF) + tl.minimum(up_to_here, n_ties) - 1
        n_above += tl.sum(above.to(tl.int32))
        n_equal += tl.sum(equal.to(tl.int32))
        columns = places.to(tl.int64)
        if HAS_GROUPS:
            columns = tl.load(groups + row * n_groups + places // GROUP, mask=taken, other=0) * GROUP + places % GROUP
        tl.store(best + at, tl.load(numbers + places, mask=taken, other=0.0), mask=taken)
        tl.store(best_columns + at, columns, mask=taken)


def select_top_k(numbers: Tensor, groups: Tensor | None, k: int, magnitude: bool) -> tuple[Tensor, Tensor]:
    n_rows = numbers.shape[0]
    for n_parts in parts_of_selection(numbers.shape[1], k):
        n = numbers.shape[1]
        width = triton.cdiv(n, n_parts)
        best = numbers.new_empty(n_rows, n_parts * k)
        columns = numbers.new_empty(n_rows, n_parts * k, dtype=torch.int64)
        n_groups = n if groups is None else groups.shape[1]
        block = triton.next_power_of_2(width)
        _select_top_k[(n_rows, n_parts)](
            numbers, columns if groups is None else groups, best, columns, n, n_groups, width, K=k,
            MAGNITUDE=magnitude, HAS_GROUPS=groups is not None, GROUP=n // n_groups, BLOCK=block,
            PIECE=min(block, 1024), num_warps=_warps(block),
        )
        numbers, groups = best, columns  # where a row was ranked in parts, what is left of it is ranked next
    return best, columns


@triton.jit
def _products(
    x, rows, tokens, features, are_tokens, are_features, d_in, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK: tl.constexpr, IS_EVEN: tl.constexpr,
):
    """Products of features and tokens, rounded as torch rounds them.

    A product has the same bits in a tile of any size, wherever in it: it is one sum along d_in, 8 or 16 numbers at a
    time as the tensor cores take them, or one by one, and always in that order.
    """
    columns = tl.arange(0, BLOCK)
    row_at = rows + features.to(tl.int64)[:, None] * d_in + columns[None, :]
    x_at = x + tokens.to(tl.int64)[None, :] * d_in + columns[:, None]
    are_features, are_tokens = are_features[:, None], are_tokens[None, :]
    products = tl.zeros([features.shape[0], tokens.shape[0]], tl.float32)
    for first in range(0, d_in, BLOCK):
        if IS_EVEN:
            row_mask, x_mask = are_features, are_tokens
        else:
            inside = columns < d_in - first
            row_mask, x_mask = are_features & inside[None, :], are_tokens & inside[:, None]
        of_tokens = tl.load(x_at, mask=x_mask, other=0.0)
        # Rows are rounded here: a copy of the encoder in bfloat16 would take 1.2 GB at 1,048,576 x 576.
        of_features = tl.load(row_at, mask=row_mask, other=0.0).to(of_tokens.dtype)
        if WIDEN:  # Triton's interpreter does not multiply in bfloat16
            of_features, of_tokens = of_features.to(tl.float32), of_tokens.to(tl.float32)
        products = tl.dot(of_features, of_tokens, products, input_precision=PRECISION)
        row_at += BLOCK
        x_at += BLOCK
    return products.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _scores(
    products, bias, scale, features, are_features, MAGNITUDE: tl.constexpr, HAS_SCALE: tl.constexpr,
):
    """Scores; of features that are not there one that is below all, or with MAGNITUDE zero."""
    scores = products + tl.load(bias + features, mask=are_features, other=0.0)[:, None]
    if HAS_SCALE:
        scores *= tl.load(scale + features, mask=are_features, other=0.0)[:, None]
    return tl.where(are_features[:, None], scores, 0.0 if MAGNITUDE else -float("inf"))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _group_maxima(
    x, rows, bias, scale, maxima, n_tokens, d_sae, n_groups, d_in, GROUP: tl.constexpr, MAGNITUDE: tl.constexpr,
    HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, IS_EVEN: tl.constexpr,
    FEATURES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Programs that are under way together share rows of the encoder, which are read from memory once."""
    program, n_tiles = tl.program_id(0), tl.cdiv(n_tokens, TOKENS)
    tokens = program % n_tiles * TOKENS + tl.arange(0, TOKENS)
    first = program // n_tiles * FEATURES
    features = first + tl.arange(0, FEATURES)
    are_tokens, are_features = tokens < n_tokens, features < d_sae
    products = _products(
        x, rows, tokens, features, are_tokens, are_features, d_in, PRECISION, WIDEN, BLOCK, IS_EVEN
    )
    scores = _scores(products, bias, scale, features, are_features, MAGNITUDE, HAS_SCALE)
    if MAGNITUDE:
        scores = tl.abs(scores)
    largest = tl.reduce(tl.reshape(scores, [FEATURES // GROUP, GROUP, TOKENS]), 1, _larger)
    groups = first // GROUP + tl.arange(0, FEATURES // GROUP)
    at = maxima + tokens.to(tl.int64)[None, :] * n_groups + groups[:, None]
    tl.store(at, largest, mask=are_tokens[None, :] & (groups[:, None] < n_groups))


@triton.jit
def _group_scores(
    x, rows, bias, scale, owners, order, out, n_entries, d_sae, d_in, K: tl.constexpr, GROUP: tl.constexpr,
    MAGNITUDE: tl.constexpr, HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    IS_EVEN: tl.constexpr, FEATURES: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr,
):
    """Entries in the order of their groups; all tiles of features that they belong to, one after the other."""
    entries = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    real = entries < n_entries
    group = tl.load(owners + entries, mask=real, other=0)
    position = tl.load(order + entries, mask=real, other=0)
    tile = tl.where(real, group // (FEATURES // GROUP), LAST)
    places = tl.arange(0, FEATURES)
    here = tl.min(tile)
    while here < LAST:
        features, of_tile = here * FEATURES + places, tile == here
        are_features = features < d_sae
        products = _products(
            x, rows, position // K, features, of_tile, are_features, d_in, PRECISION, WIDEN, BLOCK, IS_EVEN
        )
        scores = _scores(products, bias, scale, features, are_features, MAGNITUDE, HAS_SCALE)
        of_group = (features // GROUP)[:, None] == group[None, :]
        at = out + position[None, :] * GROUP + (places % GROUP)[:, None]
        tl.store(at, scores, mask=of_group & of_tile[None, :])
        here = tl.min(tl.where(tile > here, tile, LAST))


# Tiles of the product by the way its numbers are multiplied. Which one is quickest on a card is found out by timing in
# the first step. All give the same bits (see ``_products``), so that no checkpoint has to know which one it was.
_TILES = {
    "half": [
        triton.Config({"FEATURES": 128, "TOKENS": 256, "BLOCK": 64}, num_warps=8, num_stages=3),
        triton.Config({"FEATURES": 128, "TOKENS": 128, "BLOCK": 64}, num_warps=8, num_stages=3),
        triton.Config({"FEATURES": 128, "TOKENS": 128, "BLOCK": 64}, num_warps=4, num_stages=3),
    ],
    "tf32": [
        triton.Config({"FEATURES": 128, "TOKENS": 128, "BLOCK": 32}, num_warps=8, num_stages=4),
        triton.Config({"FEATURES": 128, "TOKENS": 128, "BLOCK": 32}, num_warps=4, num_stages=3),
    ],
    "ieee": [
        triton.Config({"FEATURES": 128, "TOKENS": 128, "BLOCK": 16}, num_warps=8, num_stages=3),
        triton.Config({"FEATURES": 64, "TOKENS": 128, "BLOCK": 16}, num_warps=8, num_stages=3),
        triton.Config({"FEATURES": 64, "TOKENS": 64, "BLOCK": 16}, num_warps=4, num_stages=3),
    ],
}

# In Triton's interpreter small ones, which it takes less time for, and nothing is timed.
_IS_COMPILED = isinstance(_larger, triton.runtime.JITFunction)
_INTERPRETED = triton.Config({"FEATURES": 64, "TOKENS": 16, "BLOCK": 16})

_tuned = {
    way: triton.autotune(tiles if _IS_COMPILED else [_INTERPRETED], key=["d_sae", "d_in"])(_group_maxima)
    for way, tiles in _TILES.items()
}


def _way(dtype: torch.dtype) -> str:
    """How numbers are multiplied: the key of ``_TILES``."""
    if dtype != torch.float32:
        return "half"
    # Newer versions of torch refuse to give allow_tf32 to those who have set its successor.
    matmul = torch.backends.cuda.matmul
    is_tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if is_tf32 else "ieee"


def _options(x: Tensor, scale: Tensor | None, group: int, magnitude: bool) -> dict[str, Any]:
    """What both products are made with."""
    way = _way(x.dtype)
    block = (_TILES[way][0] if _IS_COMPILED else _INTERPRETED).kwargs["BLOCK"]
    return {
        "GROUP": group, "MAGNITUDE": magnitude, "HAS_SCALE": scale is not None, "WIDEN": not _IS_COMPILED,
        "PRECISION": "tf32" if way == "tf32" else "ieee", "IS_EVEN": x.shape[1] % block == 0,
    }


def group_maxima(
    x: Tensor, rows: Tensor, bias: Tensor, scale: Tensor | None, group: int, magnitude: bool
) -> Tensor:
    (n_tokens, d_in), d_sae = x.shape, rows.shape[0]
    n_groups = triton.cdiv(d_sae, group)
    maxima = x.new_empty(n_tokens, n_groups, dtype=torch.float32)
    _tuned[_way(x.dtype)][
        lambda tile: (triton.cdiv(n_tokens, tile["TOKENS"]) * triton.cdiv(d_sae, tile["FEATURES"]),)
    ](
        x.contiguous(), rows.contiguous(), bias, bias if scale is None else scale, maxima, n_tokens, d_sae, n_groups,
        d_in, **_options(x, scale, group, magnitude),
    )
    return maxima


def group_scores(
    x: Tensor, rows: Tensor, bias: Tensor, scale: Tensor | None, owners: Tensor, order: Tensor, group: int,
    magnitude: bool,
) -> Tensor:
    (n_tokens, d_in), n_entries = x.shape, owners.numel()
    k = n_entries // n_tokens
    out = x.new_empty(n_tokens, k * group, dtype=torch.float32)
    tile = _TILES[_way(x.dtype)][0] if _IS_COMPILED else _INTERPRETED
    _group_scores[(triton.cdiv(n_entries, ENTRIES),)](
        x.contiguous(), rows.contiguous(), bias, bias if scale is None else scale, owners, order, out, n_entries,
        rows.shape[0], d_in, K=k, **_options(x, scale, group, magnitude), FEATURES=64, ENTRIES=ENTRIES,
        BLOCK=tile.kwargs["BLOCK"], LAST=2**31 - 1, num_warps=4, num_stages=3,
    )
    return out


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
    total = tl.zeros([], tl.float32)
    for first in range(0, d_in, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < d_in
        reaching = tl.zeros([BLOCK], tl.float32)
        for feature in range(program * n_features, tl.minimum((program + 1) * n_features, d_sae)):
            start, stop = tl.load(starts + feature), tl.load(starts + feature + 1)
            if stop > start:
                d_decoder, d_encoder, d_bias = _row_gradients(
                    start, stop, order, values, d_values, d_out, x, tile_rows, tile_bias, columns, inside, d_in, K,
                    TILE, BLOCK,
                )
                total += tl.sum(d_decoder * d_decoder + d_encoder * d_encoder)
                total += tl.where(first == 0, d_bias * d_bias, 0.0)
                reaching += d_bias * tl.load(W_enc + feature * d_in + columns, mask=inside, other=0.0)
        tl.store(d_input + program * d_in + columns, reaching, mask=inside)
    tl.store(squares + program, total)


def gradient_squares(
    starts: Tensor, order: Tensor, values: Tensor, d_values: Tensor, d_out: Tensor, x: Tensor,
    tile_rows: Tensor, tile_bias: Tensor, W_enc: Tensor,
) -> tuple[Tensor, Tensor]:
    d_sae, d_in = W_enc.shape
    n_features = triton.cdiv(d_sae, PROGRAMS)
    n_programs, block = triton.cdiv(d_sae, n_features), min(MAX_COLUMNS, triton.next_power_of_2(d_in))
    squares, d_input = x.new_empty(n_programs), x.new_empty(n_programs, d_in)
    _gradient_squares[(n_programs,)](
        starts, order, values, d_values, d_out, x, tile_rows, tile_bias, W_enc, squares, d_input, d_in, d_sae,
        n_features, K=values.shape[1], TILE=TILE_OF_ENTRIES, BLOCK=block, num_warps=_warps(block),
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
def _kept(last_steps, feature, step, beta1, beta2, log_beta1, log_beta2, DECAYS: tl.constexpr):
    """What a row's moments are multiplied by: their betas, once more for each step of its silence where they decay."""
    if DECAYS:
        silent = (step - 1 - tl.load(last_steps + feature)).to(tl.float32)
        tl.store(last_steps + feature, step)
        beta1 *= tl.exp2(silent * log_beta1)
        beta2 *= tl.exp2(silent * log_beta2)
    return beta1, beta2


@triton.jit(do_not_specialize=["step"])
def _move_rows(
    W_enc, b_enc, W_dec, W_enc_exp_avg, b_enc_exp_avg, W_dec_exp_avg, W_enc_exp_avg_sq, b_enc_exp_avg_sq,
    W_dec_exp_avg_sq, W_enc_last, b_enc_last, W_dec_last, starts, order, values, d_values, d_out, x, tile_rows,
    tile_bias, divisor, d_in, step, step_size, root_scale, beta1, one_less_beta1, beta2, one_less_beta2, log_beta1,
    log_beta2, eps, K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, DECAYS: tl.constexpr,
):
    feature = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(starts + feature), tl.load(starts + feature + 1)
    if stop > start:
        by = tl.load(divisor)
        W_enc_beta1, W_enc_beta2 = _kept(W_enc_last, feature, step, beta1, beta2, log_beta1, log_beta2, DECAYS)
        b_enc_beta1, b_enc_beta2 = _kept(b_enc_last, feature, step, beta1, beta2, log_beta1, log_beta2, DECAYS)
        W_dec_beta1, W_dec_beta2 = _kept(W_dec_last, feature, step, beta1, beta2, log_beta1, log_beta2, DECAYS)
        d_bias = 0.0
        for first in range(0, d_in, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            inside = columns < d_in
            d_decoder, d_encoder, d_bias = _row_gradients(
                start, stop, order, values, d_values, d_out, x, tile_rows, tile_bias, columns, inside, d_in, K, TILE,
                BLOCK,
            )
            row = feature * d_in + columns
            _adam(
                W_dec, W_dec_exp_avg, W_dec_exp_avg_sq, row, inside, d_decoder / by,
                step_size, root_scale, W_dec_beta1, one_less_beta1, W_dec_beta2, one_less_beta2, eps,
            )
            _adam(
                W_enc, W_enc_exp_avg, W_enc_exp_avg_sq, row, inside, d_encoder / by,
                step_size, root_scale, W_enc_beta1, one_less_beta1, W_enc_beta2, one_less_beta2, eps,
            )
        _adam(
            b_enc, b_enc_exp_avg, b_enc_exp_avg_sq, feature, True, d_bias / by,
            step_size, root_scale, b_enc_beta1, one_less_beta1, b_enc_beta2, one_less_beta2, eps,
        )


def move_rows_(
    tensors: list[Tensor], last_steps: list[Tensor], starts: Tensor, order: Tensor, values: Tensor, d_values: Tensor,
    d_out: Tensor, x: Tensor, tile_rows: Tensor, tile_bias: Tensor, divisor: Tensor, numbers: list[float], step: int,
) -> None:
    d_in = x.shape[1]
    step_size, root_scale, beta1, beta2, eps = numbers
    # Of a beta of 0 nothing is left after a step, and all without one: 2^(0 * -inf) would not be a number.
    logs = [math.log2(beta) if beta else -1e30 for beta in (beta1, beta2)]
    block = min(MAX_COLUMNS, triton.next_power_of_2(d_in))
    _move_rows[(starts.numel() - 1,)](
        *tensors, *(last_steps or [starts] * 3), starts, order, values, d_values, d_out, x, tile_rows, tile_bias,
        divisor, d_in, step, step_size, root_scale, beta1, 1 - beta1, beta2, 1 - beta2, *logs, eps,
        K=values.shape[1], TILE=TILE_OF_ENTRIES, BLOCK=block, DECAYS=bool(last_steps), num_warps=_warps(block),
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
        counts, before = tl.zeros([N], tl.int32), tl.zeros([N], tl.int32)
        for first in range(0, n_rows, N):
            flags = tl.load(good + first + rows, mask=first + rows < n_rows, other=0).to(tl.int32)
            counts += flags
            before += tl.where(first + rows < row, flags, 0)
        n_good = tl.sum(counts)
        turn = (row - tl.sum(before)) % tl.maximum(n_good, 1)
        weight = tl.where(n_good > 0, 1.0, 0.0)
        source, passed = tl.zeros([], tl.int64), tl.zeros([], tl.int32)
        for first in range(0, n_rows, N):
            flags = tl.load(good + first + rows, mask=first + rows < n_rows, other=0).to(tl.int32)
            is_it = (flags == 1) & (passed + tl.cumsum(flags, 0) == turn + 1)
            source += tl.sum(tl.where(is_it, first + rows, 0))
            passed += tl.sum(flags)
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
        n = min(MAX_FLAGS, triton.next_power_of_2(n_rows))
        _replace_bad_rows[(n_rows,)](x, good, out, n_rows, d_in, N=n, BLOCK=block, num_warps=4)
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
