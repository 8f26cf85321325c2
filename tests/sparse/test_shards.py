"""What processes tell one another, and how features are spread over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saelens_asi.sparse.shards import ALONE, Group, Processes, Shard, bounds
from tests.helpers.processes import in_processes


def _world() -> Group:
    return Processes.spread(1, "cpu").world


def _all_collectives() -> dict[str, Any]:
    world = _world()
    own = torch.arange(3.0) + 10 * world.rank
    return {
        "sum": world.sum_(own.clone()),
        "max": world.max_(own.clone()),
        "first": world.as_first_(own.clone()),
        "later": world.max_later(own.clone())(),
        "exchange": world.exchange(torch.arange(2.0 * world.size).view(world.size, 2) + 10 * world.rank),
        "gather": world.gather(own),
        "rows": world.gather_rows(own[: world.rank + 1]),
        "objects": world.gather_objects({"rank": world.rank}),
        "of_first": world.of_first(world.rank),
        "calls": world.traffic.calls,
        "n_bytes": world.traffic.n_bytes,
    }


@pytest.mark.parametrize("n", [2, 3])
def test_every_process_gets_what_all_have(n: int) -> None:
    owns = [torch.arange(3.0) + 10 * rank for rank in range(n)]
    for rank, told in enumerate(in_processes(n, _all_collectives)):
        mine = torch.tensor([[2.0 * rank, 2.0 * rank + 1]]) + 10 * torch.arange(n)[:, None]
        assert torch.equal(told["exchange"], mine)
        assert torch.equal(told["sum"], torch.stack(owns).sum(0))
        assert torch.equal(told["max"], owns[-1])
        assert torch.equal(told["later"], owns[-1])
        assert torch.equal(told["first"], owns[0])
        assert torch.equal(told["gather"], torch.stack(owns))
        assert [rows.tolist() for rows in told["rows"]] == [own[: i + 1].tolist() for i, own in enumerate(owns)]
        assert told["objects"] == [{"rank": rank} for rank in range(n)]
        assert told["of_first"] == 0
        ring = (n - 1) / n
        assert told["n_bytes"] == pytest.approx(
            3 * (2 * 12 * ring) + 12 * ring + 8 * (n - 1) + 12 * (n - 1) + 8 * (n - 1) + 4 * n * (n - 1)
        )


def test_a_process_that_is_alone_sends_nothing() -> None:
    own = torch.arange(3.0)
    assert all(one is own for one in (ALONE.sum_(own), ALONE.max_(own), ALONE.max_later(own)(), ALONE.exchange(own)))
    assert ALONE.gather_rows(own)[0] is own
    assert torch.equal(ALONE.gather(own), own[None])
    assert [*ALONE.gather_objects(7), ALONE.of_first(7)] == [7, 7]
    assert ALONE.traffic.calls == 0
    assert Processes.spread(1, "cpu") == Processes()


def _mesh() -> tuple[tuple[int, int], tuple[int, int], int, int, slice]:
    processes = Processes.spread(2, "cpu")
    shard = processes.shard(10)
    features, tokens = processes.features, processes.tokens
    return (features.rank, features.size), (tokens.rank, tokens.size), shard.first, shard.stop, shard.part(9)


def test_neighbours_hold_other_features_of_the_same_tokens() -> None:
    assert in_processes(4, _mesh) == [
        ((0, 2), (0, 2), 0, 5, slice(0, 4)),
        ((1, 2), (0, 2), 5, 10, slice(0, 4)),
        ((0, 2), (1, 2), 0, 5, slice(4, 9)),
        ((1, 2), (1, 2), 5, 10, slice(4, 9)),
    ]


def test_features_are_spread_as_torch_chunks_them() -> None:
    for d_sae, n in [(8, 2), (10, 4), (7, 7), (1, 1), (100, 3)]:
        chunks = torch.arange(d_sae).chunk(n)
        assert [list(range(*one)) for one in bounds(d_sae, n)] == [chunk.tolist() for chunk in chunks]


@pytest.mark.parametrize(("d_sae", "n"), [(9, 4), (3, 4)])
def test_no_process_is_without_features(d_sae: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"d_sae={d_sae} features cannot be spread over {n} processes"):
        bounds(d_sae, n)


def test_own_part_of_a_whole_tensor() -> None:
    shard = Shard(6, 2, 4)
    whole = torch.arange(12).view(6, 2)
    assert torch.equal(shard.own(whole), whole[2:4])
    assert torch.equal(shard.own(whole.t(), dim=1), whole[2:4].t())
