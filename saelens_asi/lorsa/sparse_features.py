"""The sparse part of a Lorsa: pre-activations, selection and gradients without the dense feature matrix.

Pre-activations are made for a few QK heads at a time and only the selected ones are kept, so neither pass holds
batch x positions x n_ov_heads values. The backward pass recomputes the values of the features that were selected in the
batch, and no others: rows of W_V and W_O that were not selected get a gradient of exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear, scaled_dot_product_attention

# Features are treated in at least so many pieces, so that their pre-activations never exist all at once.
_PIECES = 4

# Pre-activations made at a time, where a quarter of all are more than that.
_MAX_CHUNK_VALUES = 2**24


class SparseFeatures(NamedTuple):
    """Features selected at each of n rows (a row is one position of one sequence), in row order.

    Attributes:
        values: (m,) activations.
        features: (m,) int64 indices of OV heads.
        offsets: (n,) int64, where each row starts.
    """

    values: Tensor
    features: Tensor
    offsets: Tensor

    @property
    def rows(self) -> Tensor:
        """(m,) int64 row of each entry."""
        return _rows(self.offsets, self.values.shape[0])

    def to_dense(self, n_features: int) -> Tensor:
        """(n, n_features)."""
        dense = self.values.new_zeros(self.offsets.shape[0], n_features)
        return dense.index_put((self.rows, self.features), self.values)


@dataclass(frozen=True)
class Selection:
    """Which pre-activations count.

    Attributes:
        k: features a row.
        relu: only positive ones.
        across_rows: the k * n_rows largest of all rows together (batch-TopK).
        threshold: instead, all above this value (batch-TopK after training).
    """

    k: int
    relu: bool
    across_rows: bool = False
    threshold: float | None = None


@dataclass(frozen=True)
class Scores:
    """How patterns come from queries and keys.

    Attributes:
        scale: scores are divided by it.
        soft_cap: of the scores, or None.
        mask: (batch or 1, 1, n_queries, n_keys) bool, True where a query may attend; None for plain causal.
    """

    scale: float
    soft_cap: float | None
    mask: Tensor | None

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        """(batch, heads, n_queries, n_keys) from (batch, heads, n, d_qk); rows that may attend to nothing are zero."""
        scores = q @ k.mT / self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        mask = self.mask
        if mask is None:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).masked_fill(~mask, 0.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """pattern(q, k) @ v, without the pattern where torch's fused attention allows."""
        if self.soft_cap is not None:
            return self.pattern(q, k) @ v
        return scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.mask is None, scale=1 / self.scale
        )


def select_features(
    q: Tensor, k: Tensor, x: Tensor, W_V: Tensor, b_V: Tensor, scores: Scores, selection: Selection
) -> SparseFeatures:
    """Selected activations, differentiable in all tensors.

    Args:
        q: (batch, n_qk, n_queries, d_qk) queries of the last n_queries positions.
        k: (batch, n_qk, n_keys, d_qk) keys.
        x: (batch, n_keys, d_model) input.
        W_V: (n_ov, d_model).
        b_V: (n_ov,).
        scores: how patterns are made.
        selection: which features count.

    Returns:
        Features of the batch * n_queries rows.
    """
    return SparseFeatures(*_SelectFeatures.apply(q, k, x, W_V, b_V, scores, selection))


def decode(features: SparseFeatures, W_O: Tensor) -> Tensor:
    """(n, d_model): the sum of each row's features times their rows of ``W_O`` (n_ov, d_model)."""
    return embedding_bag(
        features.features, W_O, features.offsets, mode="sum", per_sample_weights=features.values.to(W_O.dtype)
    )


class _SelectFeatures(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, x: Tensor, W_V: Tensor, b_V: Tensor, scores: Scores, selection: Selection
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks = _pre_activations(q, k, x, W_V, b_V, scores)
        if selection.threshold is not None:
            values, features, offsets = _above(chunks, selection.threshold)
        elif selection.across_rows:
            values, features, offsets = _top_of_all_rows(chunks, selection)
        else:
            values, features, offsets = _top_of_each_row(chunks, selection)
        ctx.save_for_backward(q, k, x, W_V, b_V, values, features, offsets)
        ctx.scores, ctx.relu = scores, selection.relu
        ctx.mark_non_differentiable(features, offsets)
        return values, features, offsets

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, x, W_V, b_V, values, features, offsets = ctx.saved_tensors
        grad = grads[0].masked_fill(values <= 0, 0.0) if ctx.relu else grads[0]
        batch, n_qk, n_queries, _ = q.shape
        group = W_V.shape[0] // n_qk
        out = [torch.zeros_like(tensor) if ctx.needs_input_grad[i] else None for i, tensor in enumerate((q, k, x))]
        grad_W, grad_b = torch.zeros_like(W_V), torch.zeros_like(b_V)

        by_feature = features.argsort()
        rows = _rows(offsets, values.shape[0])[by_feature]
        features, grad = features[by_feature], grad[by_feature]
        pieces = _pieces(n_qk, group)
        starts = torch.tensor([start for _, start, _ in pieces] + [W_V.shape[0]], device=q.device)
        bounds = torch.searchsorted(features, starts).tolist()
        for i_piece, (head, _, _) in enumerate(pieces):
            entries = slice(bounds[i_piece], bounds[i_piece + 1])
            active, columns = torch.unique_consecutive(features[entries], return_inverse=True)
            if active.numel() == 0:
                continue
            grad_z = grad.new_zeros(batch * n_queries, active.numel())
            grad_z[rows[entries], columns] = grad[entries]
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (q[:, head], k[:, head], x, W_V[active], b_V[active])]
                z = ctx.scores.attend(
                    leaves[0][:, None], leaves[1][:, None], linear(leaves[2], leaves[3], leaves[4])[:, None]
                )
            inputs = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad, strict=False) if needed]
            gradients = iter(torch.autograd.grad(z, inputs, grad_z.view_as(z)))
            for i, total in enumerate(out):
                if total is not None:
                    (total if i == 2 else total[:, head]).add_(next(gradients))
            if ctx.needs_input_grad[3]:
                grad_W[active] = next(gradients)
            if ctx.needs_input_grad[4]:
                grad_b[active] = next(gradients)
        weights = (
            grad_W if ctx.needs_input_grad[3] else None,
            grad_b if ctx.needs_input_grad[4] else None,
        )
        return (*out, *weights, None, None)


def _pieces(n_qk: int, group: int) -> list[tuple[int, int, int]]:
    """(QK head, first feature, end) of pieces that hold at most a quarter of all features, and one head each.

    A piece takes four times its size (values, pre-activations, a copy in row order, the piece before; backward, values,
    pre-activations and the gradients of both), which together is then no more than all pre-activations once.
    """
    width = min(group, -(-n_qk * group // _PIECES))
    return [
        (head, head * group + start, head * group + min(start + width, group))
        for head in range(n_qk)
        for start in range(0, group, width)
    ]


def _pre_activations(
    q: Tensor, k: Tensor, x: Tensor, W_V: Tensor, b_V: Tensor, scores: Scores
) -> Iterator[tuple[int, Tensor]]:
    """Index of the first feature and (rows, features) pre-activations, piece by piece or a few heads at a time."""
    batch, n_qk, n_queries, _ = q.shape
    group = W_V.shape[0] // n_qk
    heads_at_once = min(_MAX_CHUNK_VALUES // (batch * x.shape[1] * group), n_qk // _PIECES)
    if heads_at_once > 1:
        firsts = range(0, n_qk, heads_at_once)
        chunks = [(slice(i, i + heads_at_once), i * group, min(i + heads_at_once, n_qk) * group) for i in firsts]
    else:
        chunks = [(slice(head, head + 1), start, stop) for head, start, stop in _pieces(n_qk, group)]
    for heads, start, stop in chunks:
        v = linear(x, W_V[start:stop], b_V[start:stop])
        v = v.unflatten(-1, (q[:, heads].shape[1], -1)).transpose(1, 2)
        z = scores.attend(q[:, heads], k[:, heads], v)
        yield start, z.transpose(1, 2).reshape(batch * n_queries, -1)


def _top_of_each_row(chunks: Iterator[tuple[int, Tensor]], selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    best: tuple[Tensor, Tensor] | None = None
    for start, z in chunks:
        values, features = z.topk(min(selection.k, z.shape[1]), dim=1, sorted=False)
        features += start
        if best is not None:
            values, features = torch.cat([best[0], values], dim=1), torch.cat([best[1], features], dim=1)
            if values.shape[1] > selection.k:
                values, index = values.topk(selection.k, dim=1, sorted=False)
                features = features.gather(1, index)
        best = values, features
    values, features = best  # type: ignore[misc]
    n, k = values.shape
    offsets = torch.arange(0, n * k, k, device=values.device)
    return (values.relu() if selection.relu else values).flatten(), features.flatten(), offsets


def _top_of_all_rows(chunks: Iterator[tuple[int, Tensor]], selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for start, z in chunks:
        n_entries = selection.k * z.shape[0]
        values, flat = z.flatten().topk(min(n_entries, z.numel()), sorted=False)
        rows, features = flat // z.shape[1], flat % z.shape[1] + start
        if best is not None:
            values, rows, features = (torch.cat(pair) for pair in zip(best, (values, rows, features), strict=True))
            values, index = values.topk(min(n_entries, values.numel()), sorted=False)
            rows, features = rows[index], features[index]
        best, n_rows = (values, rows, features), z.shape[0]
    values, rows, features = best  # type: ignore[misc]
    if selection.relu:
        positive = ~(values <= 0)  # what is not a number stays, to be seen
        values, rows, features = values[positive], rows[positive], features[positive]
    return _in_row_order(values, rows, features, n_rows)


def _above(chunks: Iterator[tuple[int, Tensor]], threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    entries: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, z in chunks:
        rows, columns = (~(z <= threshold)).nonzero(as_tuple=True)
        entries.append((z[rows, columns], rows, columns + start))
        n_rows = z.shape[0]
    values, rows, features = (torch.cat(parts) for parts in zip(*entries, strict=True))
    return _in_row_order(values, rows, features, n_rows)


def _in_row_order(values: Tensor, rows: Tensor, features: Tensor, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    order = rows.argsort()
    offsets = torch.searchsorted(rows[order], torch.arange(n_rows, device=rows.device))
    return values[order], features[order], offsets


def _rows(offsets: Tensor, m: int) -> Tensor:
    ends = torch.cat([offsets[1:], offsets.new_tensor([m])])
    return torch.repeat_interleave(torch.arange(offsets.shape[0], device=offsets.device), ends - offsets)
