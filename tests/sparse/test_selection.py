"""The best scores of tokens and of batches whose features, and tokens, lie in several processes: ties included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saelens_asi.sparse.selection import batch_top_k, batch_width, select_top_k
from saelens_asi.sparse.shards import Processes, Shard
from saelens_asi.sparse.topk import TopK, entries_of, top_k
from tests.helpers.processes import in_processes

N_TOKENS, D_SAE = 40, 57


def _scores(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(N_TOKENS, D_SAE, generator=generator)
    if kind == "ties":
        return scores.mul(1.5).round()
    if kind == "all equal":
        return torch.ones_like(scores)
    if kind == "few positive":
        return scores - 2.5
    if kind == "one process has all":
        scores[:, 20:] -= 100
    return scores


KINDS = ["random", "ties", "all equal", "few positive", "one process has all"]


def _places(shard: Shard, tokens: Tensor, features: Tensor) -> Tensor:
    here = (tokens + shard.part(N_TOKENS).start) * D_SAE + features + shard.first
    return torch.cat(shard.world.gather_rows(here)).sort().values


def _own(scores: Tensor, shard: Shard) -> Tensor:
    return shard.own(scores[shard.part(N_TOKENS)], dim=1)


def _of_tokens(kind: str, k: int, magnitude: bool, batch_shards: int) -> tuple[Tensor, Tensor]:
    shard = Processes.spread(batch_shards, "cpu").shard(D_SAE)
    own = _own(_scores(kind), shard)
    best = top_k(own.abs() if magnitude else own, min(k, shard.n_features))
    signed = TopK(own.gather(1, best.indices), best.indices)
    entries = select_top_k(signed, k, shard.features, magnitude)
    assert torch.equal(entries.scores, own[entries.tokens, entries.features])
    return _places(shard, entries.tokens, entries.features), entries.scores


def _first_of_equals(scores: Tensor, k: int) -> Tensor:
    """Places of the k largest of each row; of equal ones the first."""
    columns = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return (torch.arange(len(scores))[:, None] * scores.shape[1] + columns).flatten().sort().values


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize(("n", "batch_shards"), [(1, 1), (3, 1), (4, 2)])
def test_the_best_of_a_token_are_those_of_one_process(n: int, batch_shards: int, magnitude: bool) -> None:
    for kind, k in [(kind, k) for kind in KINDS for k in (1, 5, 25)]:
        scores = _scores(kind).abs() if magnitude else _scores(kind)
        expected = _first_of_equals(scores, k)
        if n == 1:
            entries = entries_of(top_k(scores, k))
            assert torch.equal((entries.tokens * D_SAE + entries.features).sort().values, expected)
            continue
        for places, _ in in_processes(n, _of_tokens, kind, k, magnitude, batch_shards):
            assert torch.equal(places, expected), (kind, k)


def _of_batch(kind: str, n_entries: int, batch_shards: int) -> tuple[Tensor, Tensor | None]:
    shard = Processes.spread(batch_shards, "cpu").shard(D_SAE)
    return _best_of_batch(_scores(kind), n_entries, shard)


def _best_of_batch(scores: Tensor, n_entries: int, shard: Shard) -> tuple[Tensor, Tensor | None]:
    own = _own(scores, shard)
    first = top_k(own, batch_width(n_entries, N_TOKENS, shard.n_features))
    entries, lowest = batch_top_k(first, n_entries, shard, N_TOKENS, lambda some, k: top_k(own[some], k))
    assert torch.equal(entries.scores, own[entries.tokens, entries.features])
    return _places(shard, entries.tokens, entries.features), lowest


@pytest.mark.parametrize(("n", "batch_shards"), [(1, 1), (3, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_of_a_batch_are_those_of_one_process(kind: str, n: int, batch_shards: int) -> None:
    scores = _scores(kind)
    for n_entries in (1, 100, 700):
        ranked = scores.flatten().sort(descending=True, stable=True)
        n_kept = min(n_entries, int((scores > 0).sum()))
        expected, lowest = ranked.indices[:n_kept].sort().values, ranked.values[n_kept - 1]
        if n == 1:
            found = [_best_of_batch(scores, n_entries, Shard.whole(D_SAE))]
        else:
            found = in_processes(n, _of_batch, kind, n_entries, batch_shards)
        for places, least in found:
            assert torch.equal(places, expected)
            assert least == lowest
