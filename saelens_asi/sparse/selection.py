"""Which scores are kept: of each token or of a whole batch, where features and tokens may lie in several processes.

Each process ranks its own features and keeps its own part of the best. Only scores travel, however many features there
are; a tie falls where it falls in one process, since the features of a process follow on those of the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from saelens_asi.sparse.rows import Entries
from saelens_asi.sparse.shards import Group, Shard
from saelens_asi.sparse.topk import TopK, entries_of, ranked


def select_top_k(best: TopK, k: int, group: Group, magnitude: bool = False) -> Entries:
    """Those of this process's best scores of each token that are among the k best of all processes.

    Of n processes each looks after one n-th of the tokens: it is sent their scores, k from each process, and answers
    with the lowest score that is kept, and how many of those that equal it. So k + 2 numbers a token travel from each,
    and each compares as many, however many processes there are.

    Args:
        best: the min(k, features here) best of each token; of equal scores those of the lower features.
        k: to be kept of each token.
        group: the processes that hold the other features, in the order of their features.
        magnitude: rank by absolute value.
    """
    if group.size == 1:
        return entries_of(best)
    n_tokens, n_own = best.scores.shape
    own = ranked(best.scores.abs() if magnitude else best.scores)
    n_each = -(-n_tokens // group.size)
    sent = functional.pad(own, (0, k - n_own, 0, n_each * group.size - n_tokens), value=-torch.inf)
    scores = group.exchange(sent.view(group.size, n_each, k))
    threshold, n_equal = group.exchange(_cut(scores, k)).view(-1, 2)[:n_tokens].unsqueeze(2).unbind(1)
    kept = own >= threshold
    short = (n_equal < (own == threshold).sum(dim=1, keepdim=True)).squeeze(1)
    if short.any():
        kept[short] = _with_first_equals(best.indices[short], own[short], threshold[short], n_equal[short])
    tokens, places = kept.nonzero(as_tuple=True)
    return Entries(tokens, best.indices[tokens, places], best.scores[tokens, places])


def _cut(scores: Float[Tensor, "n_processes n k"], k: int) -> Float[Tensor, "n_processes n 2"]:
    """For each process and token the lowest score that is kept, and how many of the process's equals of it.

    Of all equals, those of the first processes are kept.
    """
    of_token = scores.transpose(0, 1).flatten(1)
    threshold = of_token.topk(k, dim=1, sorted=True).values[:, -1]
    n_equal = (scores == threshold[:, None]).sum(dim=2)
    left = k - (of_token > threshold[:, None]).sum(dim=1) - n_equal.cumsum(dim=0) + n_equal
    kept = torch.minimum(left.clamp(min=0), n_equal)
    return torch.stack([threshold.expand(kept.shape), kept.to(scores.dtype)], dim=2)


def _with_first_equals(
    features: Int64[Tensor, "n k"],
    scores: Float[Tensor, "n k"],
    threshold: Float[Tensor, "n 1"],
    left: Float[Tensor, "n 1"],
) -> Bool[Tensor, "n k"]:
    """Scores above the threshold, and of those equal to it as many as are left, by feature."""
    order = features.argsort(dim=1)
    equal = (scores == threshold).gather(1, order)
    first = equal & (equal.cumsum(dim=1) <= left)
    return (scores > threshold) | torch.zeros_like(equal).scatter_(1, order, first)


class BatchSelection(NamedTuple):
    """This process's entries among the best of a batch, and the lowest score of all of these; None where none is."""

    entries: Entries
    lowest: Float[Tensor, ""] | None


def batch_width(n_entries: int, n_tokens: int, d_sae: int) -> int:
    """How many scores of each token to look at first for ``batch_top_k``: twice the average."""
    return min(d_sae, 2 * math.ceil(n_entries / max(1, n_tokens)))


def batch_top_k(
    first: TopK,
    n_entries: int,
    shard: Shard,
    n_tokens: int,
    look_up: Callable[[Bool[Tensor, " n_own"], int], TopK],
) -> BatchSelection:
    """The largest positive scores of a whole batch (BatchTopK, arXiv 2412.06410).

    A token may have any number of them. Tokens that could have more than were looked up are looked up again for twice
    as many, until none could. One number travels for each entry that a process offers: none that cannot be among the
    best, as far as it can be told from what each process has.

    Args:
        first: the ``batch_width`` largest scores of each token that this process sees, among the features it holds.
        n_entries: how many scores of all tokens and features to keep; fewer are returned where fewer are positive. Of
            equal scores those of the first tokens are kept, and of these those of the first features.
        shard: which features these are.
        n_tokens: of the whole batch, of which this process sees ``shard.part(n_tokens)``.
        look_up: gives the k largest scores of some of these tokens.
    """
    k, entries = first.scores.shape[1], entries_of(first)
    lowest = ranked(first.scores).amin(dim=1) if k else first.scores.new_zeros(len(first.scores))
    while True:
        positive = entries.where(~(entries.scores <= 0))
        scores = torch.cat(shard.world.gather_rows(_offer(ranked(positive.scores), n_entries, shard.world)))
        n_surplus = scores.numel() - n_entries
        threshold = scores.kthvalue(n_surplus).values if n_surplus > 0 else scores.new_zeros(())
        # Not ">": of a token's equal scores those that were not looked up may come first.
        unsure = (lowest >= threshold) & (lowest > 0) & (k < shard.n_features)
        if not shard.world.sum_(unsure.sum()):
            return _above(threshold, positive, scores, n_entries, shard, shard.part(n_tokens).start)
        k = min(shard.n_features, 2 * k)
        if unsure.any():
            more = look_up(unsure, k)
            lowest[unsure] = ranked(more.scores).amin(dim=1)
            settled, wider = entries.where(~unsure[entries.tokens]), entries_of(more)
            wider = wider._replace(tokens=unsure.nonzero().squeeze(1)[wider.tokens])
            entries = Entries(*(torch.cat(parts) for parts in zip(settled, wider, strict=True)))


def _offer(scores: Float[Tensor, " n_own"], n_entries: int, group: Group) -> Float[Tensor, " n"]:
    """This process's scores without those that cannot be among the best of all.

    Each process has its share of ``n_entries`` that reach the last of its own share, and all reach the lowest of these.
    """
    if group.size == 1:
        return scores
    share = -(-n_entries // group.size)
    last = scores.new_zeros(()) if scores.numel() < share else scores.kthvalue(scores.numel() - share + 1).values
    return scores[scores >= -group.max_(-last)]


def _above(
    threshold: Float[Tensor, ""],
    entries: Entries,
    scores: Float[Tensor, " n"],
    n_entries: int,
    shard: Shard,
    first_token: int,
) -> BatchSelection:
    """Of this process's entries those that are among the best of all processes', whose scores are given.

    The threshold is the largest score that is dropped, where one is; of its equals some may be kept.
    """
    if scores.numel() <= n_entries:
        return BatchSelection(entries, scores.min() if scores.numel() else None)
    own = ranked(entries.scores)
    kept, equal = own > threshold, own == threshold
    n_equals = n_entries - int((scores > threshold).sum())
    if n_equals > 0:
        places = (entries.tokens + first_token) * shard.d_sae + entries.features + shard.first
        of_all = torch.cat(shard.world.gather_rows(places[equal]))
        kept |= equal & (places <= of_all.kthvalue(n_equals).values)
    lowest = threshold if n_equals > 0 else scores[scores > threshold].min()
    return BatchSelection(entries.where(kept), lowest)
