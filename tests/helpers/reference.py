"""Slow dense twins of what the package does fast, in float64, and the settings that all property tests share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import settings
from torch import Tensor

from saelens_asi.sparse.rows import Entries, Workspace
from saelens_asi.sparse.selection import batch_top_k, batch_width
from saelens_asi.sparse.shards import Shard
from saelens_asi.sparse.topk import Encoder, Query, TopK, encode_top_k

# Derandomized: the same examples on every machine, so that a failure is a change of the code.
maths = settings(deadline=None, max_examples=25, derandomize=True)


def gaussian(seed: int, *shape: int) -> Tensor:
    """Standard normal float64 values that depend on ``seed`` alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(seed: int, d: int) -> Tensor:
    return torch.linalg.qr(gaussian(seed, d, d))[0]


def two_pass_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scatter matrix of all rows at once."""
    x = x.double()
    mean = x.mean(dim=0)
    return mean, (x - mean).T @ (x - mean)


def effective_rank_by_svd(x: Tensor) -> float:
    """arXiv 2508.16929 v3, definition 4.1, term by term."""
    s = torch.linalg.svdvals(x.double() - x.double().mean(dim=0)).tolist()
    p = [value / sum(s) for value in s]
    return math.exp(-sum(value * math.log(value) for value in p if value > 0))


def row_adam(
    param: Tensor,
    grads: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    bias_correction: str,
    eps_placement: str = "adam",
    decays: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam over the rows (dimension 0) with gradient, one number at a time; returns parameter and both moments.

    ``decays`` says for each step whether the moments of rows without gradient decay in it.
    """
    n_rows, width = param.shape
    values = param.double().tolist()
    first = [[0.0] * width for _ in range(n_rows)]
    second = [[0.0] * width for _ in range(n_rows)]
    row_steps = [0] * n_rows
    for global_step, grad in enumerate(grads, start=1):
        for i, row in enumerate(grad.double().tolist()):
            if not any(row):
                if decays is not None and decays[global_step - 1]:
                    first[i], second[i] = [betas[0] * m for m in first[i]], [betas[1] * v for v in second[i]]
                continue
            row_steps[i] += 1
            step = row_steps[i] if bias_correction == "per_row" else global_step
            for j, g in enumerate(row):
                first[i][j] = betas[0] * first[i][j] + (1 - betas[0]) * g
                second[i][j] = betas[1] * second[i][j] + (1 - betas[1]) * g * g
                m, correction = first[i][j] / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)
                if eps_placement == "adam":
                    values[i][j] -= lr * m / (math.sqrt(second[i][j]) / correction + eps)
                else:
                    values[i][j] -= lr * m * correction / (math.sqrt(second[i][j]) + eps)
    return tuple(torch.tensor(x, dtype=torch.float64) for x in (values, first, second))  # type: ignore[return-value]


def encode_batch_top_k(x: Tensor, encoder: Encoder, n_entries: int) -> Entries:
    """The largest positive scores of a whole batch, from the whole product."""
    d_sae = encoder.rows.shape[0]

    def look_up(some: Tensor, k: int) -> TopK:
        return encode_top_k(x[some], encoder, [Query(k)], Workspace())[0]

    first = look_up(torch.ones(len(x), dtype=torch.bool), batch_width(n_entries, len(x), d_sae))
    return batch_top_k(first, n_entries, Shard.whole(d_sae), len(x), look_up).entries
