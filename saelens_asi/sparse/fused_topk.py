"""The k largest scores of each token on an accelerator, exactly; the product of batch and encoder is never written.

The product is made once, and of it the largest score of each group of consecutive features is kept: the k groups with
the largest maxima have the k largest scores among them, ties included. Their scores are then made again. Launches are
as many at every size, but for one more where a row has more than ``MAX_RANKED`` groups.

The first product takes 2 * n_tokens * d_sae * d_in flops. The second is not another pass over all of it: entries
(token, group) are sorted by their group, and rows of the encoder are multiplied with the tokens that chose them, 64
features with 32 entries at a time: n_tokens * k / 32 tiles, and at most one more for each 64 features. For 4,096 tokens
and k = 32, in GFLOP:

    d_sae                    32,768   131,072   1,048,576
    first, d_in = 576           155       620       4,950
    second                       11        15          48
    first, d_in = 4,096       1,100     4,400      35,200
    second                       77       103         344

The second reads the encoder once from memory (0.1 ms at 131,072 x 576 on an H100, 0.6 ms at 131,072 x 4,096), where the
first takes at least 4.4 ms in bfloat16 at 131,072 x 4,096, and 66 ms in float32. A whole second pass would double
these: only at a million features has a tile of it few chosen groups, and most have one. Beside n_tokens * d_sae scores,
17 GB at a million, that are written and read, the maxima are 256 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor
from torch.nn import functional

from saelens_asi.sparse.operators import operator
from saelens_asi.sparse.topk import Encoder, TopK

MAX_K = 1024

# Features of a group. 16 is what a warp's tile of a product holds of a token, so that the maximum is taken within it.
_GROUPS = (16, 32, 64)

# Numbers that one program of a kernel ranks, in its registers.
MAX_RANKED = 2**14

# Features of a tile of the twins: what they hold of the product at once.
_TWIN_FEATURES = 2**13


def group_size(d_sae: int, k: int) -> int:
    """Features of a group: about as many maxima as scores of selected groups, which is where both are fewest."""
    return max([_GROUPS[0], *(size for size in _GROUPS if size * size * k <= d_sae)])


def _ordered(scores: Float32[Tensor, " *shape"]) -> Int64[Tensor, " *shape"]:
    """Keys in the order of the scores; what is not a number is largest, as in ``topk``. 32 bits, signed."""
    bits = (scores + 0.0).view(torch.int32).long()  # the zero that is added makes a positive one of a negative one
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return keys.masked_fill(scores.isnan(), 0x7FFFFFFF)


def parts_of_selection(n: int, k: int) -> list[int]:
    """In how many parts a row of n numbers is ranked, in one launch after another: the k largest of each part are left.

    Parts are of about one size, and none is narrower than k.
    """
    parts = []
    while n > MAX_RANKED:
        parts.append(-(-n // MAX_RANKED))
        n = parts[-1] * k
    return [*parts, 1]


@operator(
    "(Tensor numbers, Tensor? groups, int k, bool magnitude) -> (Tensor, Tensor)",
    n_launches=lambda numbers, groups, k, magnitude: len(parts_of_selection(numbers.shape[1], k)),
)
def select_top_k(
    numbers: Float32[Tensor, "n_rows n_numbers"],
    groups: Int64[Tensor, "n_rows n_groups"] | None,
    k: int,
    magnitude: bool,
) -> tuple[Float32[Tensor, "n_rows k"], Int64[Tensor, "n_rows k"]]:
    """The k largest numbers of each row, exactly, and their columns in ascending order.

    Of equal numbers those in lower columns are taken; what is not a number comes first. One launch up to ``MAX_RANKED``
    numbers a row, and two up to many millions.

    Args:
        numbers: to be ranked.
        groups: ascending; the numbers are those of the columns of these groups, n_numbers / n_groups of each. None for
            all columns from 0 on.
        k: at most n_numbers and ``MAX_K``.
        magnitude: rank by absolute value; what is given back keeps its sign.
    """
    ranked = numbers.abs() if magnitude else numbers
    places = torch.arange(numbers.shape[1], device=numbers.device)
    # One key for a number and its place, so that no tie is left.
    chosen = ((_ordered(ranked) << 32) - places).topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    best = numbers.gather(1, chosen)
    if groups is None:
        return best, chosen
    size = numbers.shape[1] // groups.shape[1]
    return best, groups.gather(1, chosen.div(size, rounding_mode="floor")) * size + chosen % size


def _scores_by_groups(
    x: Float[Tensor, "n_tokens d_in"],
    rows: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"] | None,
    group: int,
    magnitude: bool,
) -> Iterator[tuple[int, Float[Tensor, "n_tokens n_groups group"]]]:
    """Scores of some features at a time, by groups, of which the last is padded with what is never chosen; and the
    first of these features."""
    for first in range(0, rows.shape[0], _TWIN_FEATURES):
        part = slice(first, first + _TWIN_FEATURES)
        scores = torch.mm(x, rows[part].to(x.dtype).t()).float() + bias[part]
        scores = scores if scale is None else scores * scale[part]
        padding = 0.0 if magnitude else -torch.inf
        scores = functional.pad(scores, (0, -scores.shape[1] % group), value=padding)
        yield first, scores.view(x.shape[0], -1, group)


@operator("(Tensor x, Tensor rows, Tensor bias, Tensor? scale, int group, bool magnitude) -> Tensor")
def group_maxima(
    x: Float[Tensor, "n_tokens d_in"],
    rows: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"] | None,
    group: int,
    magnitude: bool,
) -> Float32[Tensor, "n_tokens n_groups"]:
    """The largest score of each token in each group of consecutive features, ``(x @ rows.T + bias) * scale``.

    Sums are of float32, and rounded to the dtype of ``x`` before the bias, as those of torch's product are. Float32 is
    multiplied as ``torch.backends.cuda.matmul`` says: as it is, or as TF32. One launch.

    Args:
        x: in the dtype of the product, to which rows are rounded.
        rows: of the encoder.
        bias: of the encoder.
        scale: None for 1.
        group: features of a group: 16, 32 or 64. The last group has those that are left over.
        magnitude: the largest absolute values, in place of the largest.
    """
    tiles = _scores_by_groups(x, rows, bias, scale, group, magnitude)
    return torch.cat([(scores.abs() if magnitude else scores).amax(dim=2) for _, scores in tiles], dim=1)


@operator(
    "(Tensor x, Tensor rows, Tensor bias, Tensor? scale, Tensor owners, Tensor order, int group, bool magnitude) -> "
    "Tensor"
)
def group_scores(
    x: Float[Tensor, "n_tokens d_in"],
    rows: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"] | None,
    owners: Int32[Tensor, " n_entries"],
    order: Int64[Tensor, " n_entries"],
    group: int,
    magnitude: bool,
) -> Float32[Tensor, "n_tokens width"]:
    """All scores of the groups that each token has selected, with the bits that ``group_maxima`` has seen. One launch.

    Args:
        x: and what follows, see ``group_maxima``.
        rows: of the encoder.
        bias: of the encoder.
        scale: None for 1.
        owners: the selected groups of all tokens, sorted.
        order: where each stands in (n_tokens, n_groups), which is flat.
        group: features of a group.
        magnitude: what features that are not there score: less than any, or nothing.

    Returns:
        Scores in the order of the groups and their features; width is n_groups * group.
    """
    groups = torch.empty_like(owners).scatter(0, order, owners).view(x.shape[0], -1)
    found = x.new_zeros(*groups.shape, group, dtype=torch.float32)
    for first, scores in _scores_by_groups(x, rows, bias, scale, group, magnitude):
        places = groups.long() - first // group
        here = (places >= 0) & (places < scores.shape[1])
        places = places.clamp(0, scores.shape[1] - 1)[:, :, None].expand(-1, -1, group)
        found = torch.where(here[:, :, None], scores.gather(1, places), found)
    return found.flatten(1)


def encode_top_k(x: Float32[Tensor, "n_tokens d_in"], encoder: Encoder, k: int) -> TopK:
    """The k largest scores of each token, features in ascending order.

    Scores are those of SAELens: the product in the precision that autocast and ``torch.backends.cuda.matmul`` ask for,
    bias and scale in float32 outside of it, since a product that holds them rounds them too.

    Args:
        x: what the encoder reads.
        encoder: the features.
        k: at most the number of features, and ``MAX_K``.
    """
    x = x.to(encoder.matmul_dtype or encoder.rows.dtype)
    group = group_size(encoder.rows.shape[0], k)
    features = (x, encoder.rows, encoder.bias, encoder.scale)
    maxima = group_maxima(*features, group, encoder.magnitude)
    _, groups = select_top_k(maxima, None, min(k, maxima.shape[1]), False)
    del maxima
    owners, order = torch.sort(groups.flatten().int())
    scores = group_scores(*features, owners, order, group, encoder.magnitude)
    return TopK(*select_top_k(scores, groups, k, encoder.magnitude))
