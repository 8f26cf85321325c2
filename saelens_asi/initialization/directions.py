"""Random rows of weights, the same to the bit in however many processes they are drawn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelens_asi.sparse.shards import Shard

# Rows of weights that are drawn at a time.
CHUNK = 65_536


def random_directions_(
    out: Float[Tensor, "n_features d_in"],
    basis: Float[Tensor, "d_in d_init"] | None,
    generator: torch.Generator,
    shard: Shard | None = None,
    chunk: int = CHUNK,
) -> None:
    """Fill ``out`` (n_features, d_in) with unit vectors drawn evenly from the sphere in the span of ``basis`` (d_in,
    d_init).

    Drawn in float32 on the CPU, ``chunk`` rows at a time, so that a seed gives the same directions on every device.
    Another ``chunk`` may give other directions: torch draws normal values in groups of sixteen.

    A process that holds some of the features draws all, keeps its own, and has the bits that these have in one process
    with as many threads; without ``shard`` all are its own.
    """
    shard = shard or Shard.whole(len(out))
    d_init = out.shape[1] if basis is None else basis.shape[1]
    rotation = None if basis is None else basis.T.to("cpu", torch.float32)
    for rows, here, drawn in _own_rows(shard, chunk):
        directions = torch.randn(drawn, d_init, generator=generator)
        if rows.start == rows.stop:
            continue
        directions /= directions.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        if rotation is not None:
            # Of all that were drawn: a product of fewer rows may have other bits.
            directions = directions @ rotation
        out[here].copy_(directions[rows])


@torch.no_grad()
def whole_kaiming_rows_(out: Float[Tensor, "n_features d_in"], shard: Shard, chunk: int = 4096) -> None:
    """Fill ``out`` (n_features, d_in) with this process's rows of what ``torch.nn.init.kaiming_uniform_`` gives all
    features on the CPU, in the dtype of ``out``.

    Its bound follows from d_in alone, and one value is drawn after the other: ``chunk`` changes nothing. The global
    generator ends where it would have ended.
    """
    for rows, here, drawn in _own_rows(shard, chunk):
        values = torch.empty(drawn, out.shape[1], dtype=out.dtype)
        nn.init.kaiming_uniform_(values)
        out[here].copy_(values[rows])


def _own_rows(shard: Shard, chunk: int) -> Iterator[tuple[slice, slice, int]]:
    """Of each chunk of all features: which of its rows are this process's, where they lie here, and how many it has."""
    for start in range(0, shard.d_sae, chunk):
        drawn = min(chunk, shard.d_sae - start)
        first, stop = (min(max(edge, start), start + drawn) for edge in (shard.first, shard.stop))
        here = max(0, first - shard.first)
        yield slice(first - start, stop - start), slice(here, here + stop - first), drawn
