"""Forward and backward pass of TopK autoencoders that touch only the features that are active."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from saelens_asi.kernels import kernels_take, run_kernel
from saelens_asi.row_sparse import Activations, FeatureOrder, RowGradient, total_norm, weighted_row_sum
from saelens_asi.top_k import Encoder, Query, TopK, encode_top_k
from saelens_asi.workspace import Workspace


class Entries(NamedTuple):
    """Active features, one by one: int64 tokens and features, and their scores, each (n_entries,)."""

    tokens: Tensor
    features: Tensor
    scores: Tensor

    def where(self, mask: Tensor) -> Entries:
        if mask.all():
            return self
        return Entries(self.tokens[mask], self.features[mask], self.scores[mask])


class TopKGradients(NamedTuple):
    """Gradients of a TopK autoencoder; ``b_dec`` (d_in,) is only what reaches it through the encoder's input.

    ``squares`` (n_active,) are the squared lengths of the rows of the other three together, where they are known.
    """

    W_enc: RowGradient
    b_enc: RowGradient
    W_dec: RowGradient
    b_dec: Tensor
    squares: Tensor | None = None

    def norm(self) -> Tensor:
        """The Euclidean norm of all four together; float64."""
        if self.squares is None:
            return total_norm([self.W_enc.values, self.b_enc.values, self.W_dec.values, self.b_dec])
        return (self.squares.sum(dtype=torch.float64) + self.b_dec.double().square().sum()).sqrt()


def entries_of(found: TopK) -> Entries:
    """The same, one by one, token after token."""
    n_tokens, k = found.indices.shape
    tokens = torch.arange(n_tokens, device=found.indices.device).repeat_interleave(k)
    return Entries(tokens, found.indices.flatten(), found.scores.flatten())


def encode_batch_top_k(
    x: Tensor, encoder: Encoder, n_entries: int, queries: Sequence[Query], workspace: Workspace
) -> tuple[Entries, list[TopK]]:
    """The largest positive scores of a whole batch (BatchTopK, arXiv 2412.06410), and what ``queries`` ask for.

    A token may have any number of them. Twice the average is looked up first; tokens that could have more are looked
    up again for twice as many, until none could.

    Args:
        x: (n_tokens, d_in).
        encoder: the features.
        n_entries: how many scores of the n_tokens x d_sae to keep; fewer are returned where fewer are positive.
        queries: further questions per token, answered in the same pass.
        workspace: see ``encode_top_k``.
    """
    n_tokens, d_sae = x.shape[0], encoder.rows.shape[0]
    k = min(d_sae, 2 * math.ceil(n_entries / max(1, n_tokens)))
    found, *answers = encode_top_k(x, encoder, [Query(k), *queries], workspace)
    entries = entries_of(found)
    lowest = found.scores.amin(dim=1) if k else found.scores.new_zeros(n_tokens)
    while True:
        positive = entries.where(entries.scores > 0)
        n_surplus = positive.scores.numel() - n_entries
        threshold = positive.scores.kthvalue(n_surplus).values if n_surplus > 0 else positive.scores.new_zeros(())
        unsure = lowest > threshold
        if k == d_sae or not unsure.any():
            return _drop_smallest(positive, n_surplus, threshold), answers
        k = min(d_sae, 2 * k)
        (more,) = encode_top_k(x[unsure], encoder, [Query(k)], workspace)
        lowest[unsure] = more.scores.amin(dim=1)
        settled, wider = entries.where(~unsure[entries.tokens]), entries_of(more)
        wider = wider._replace(tokens=unsure.nonzero().squeeze(1)[wider.tokens])
        entries = Entries(*(torch.cat(parts) for parts in zip(settled, wider, strict=True)))


def _drop_smallest(entries: Entries, n: int, threshold: Tensor) -> Entries:
    """All but the n smallest entries, of which ``threshold`` is the largest."""
    if n <= 0:
        return entries
    dropped = entries.scores < threshold
    ties = (entries.scores == threshold).nonzero().squeeze(1)
    dropped[ties[: n - int(dropped.sum())]] = True
    return entries.where(~dropped)


def stack_levels(levels: Sequence[Entries], n_tokens: int) -> Activations:
    """One sparse matrix from several over the same tokens: row ``level * n_tokens + token``."""
    rows = torch.cat([entries.tokens + i * n_tokens for i, entries in enumerate(levels)])
    features = torch.cat([entries.features for entries in levels])
    scores = torch.cat([entries.scores for entries in levels])
    if (rows.diff() < 0).any():
        rows, order = torch.sort(rows, stable=True)
        features, scores = features[order], scores[order]
    counts = torch.bincount(rows, minlength=len(levels) * n_tokens)
    return Activations(functional.pad(counts.cumsum(0), (1, 0)), features, scores)


def squared_error_(
    decoded: Tensor, bias: Tensor, target: Tensor, workspace: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the bias in place; the mean squared distance to the target, and its gradients by decoded rows and bias.

    For tensors that ``kernels_take``: one look at each number, where autograd writes several tensors of their size.

    Args:
        decoded: (n_tokens, d_in).
        bias: (d_in,).
        target: (n_tokens, d_in).
        workspace: holds the gradient of the decoded rows until it is used for the next step.
    """
    n_tokens = decoded.shape[0]
    gradient, errors = workspace.take("decoded gradient", decoded.shape, decoded), decoded.new_empty(n_tokens)
    run_kernel("squared_errors", n_tokens, decoded, bias, target, gradient, errors, 2 / max(1, n_tokens))
    return errors.mean(), gradient, gradient.sum(dim=0)


def topk_gradients(
    activations: Activations,
    d_decoded: Tensor,
    x: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    workspace: Workspace,
) -> TopKGradients:
    """Gradients of all parameters from those of ``activations.decode(W_dec)``.

    Every value of ``activations`` is taken to be ``x @ W_enc + b_enc`` at its place: features that ReLU holds at zero
    must not be among them.

    Args:
        activations: (n_levels * n_tokens, d_sae).
        d_decoded: (n_levels * n_tokens, d_in) gradient of the loss with respect to the decoded rows.
        x: (n_tokens, d_in) what the encoder read.
        W_enc: (d_in, d_sae).
        W_dec: (d_sae, d_in).
        workspace: holds the results until it is used for the next step.
    """
    order = activations.by_feature()
    if kernels_take(x, d_decoded, W_dec, activations.values):
        d_W_enc, d_b_enc, d_W_dec, squares = _compiled_gradients(activations, order, d_decoded, x, W_dec, workspace)
    else:
        d_values, squares = activations.products(d_decoded, W_dec), None
        d_b_enc = order.sums(d_values)
        d_W_enc = order.weighted_sums(d_values, x, "W_enc gradient", workspace)
        d_W_dec = order.weighted_sums(activations.values, d_decoded, "W_dec gradient", workspace)
    return TopKGradients(d_W_enc, d_b_enc, d_W_dec, -weighted_row_sum(W_enc.t(), d_b_enc), squares)


def _compiled_gradients(
    activations: Activations, order: FeatureOrder, d_decoded: Tensor, x: Tensor, W_dec: Tensor, workspace: Workspace
) -> tuple[RowGradient, RowGradient, RowGradient, Tensor]:
    """Gradients of W_enc, b_enc and W_dec, and their squared lengths, from one look at each token of a feature."""
    n_active, values = order.active.numel(), activations.values[order.order]
    d_W_enc, d_W_dec = (workspace.take(f"{name} gradient", (n_active, x.shape[1]), x) for name in ("W_enc", "W_dec"))
    d_b_enc, squares = x.new_empty(2, n_active)
    entries = (order.active, order.starts, order.rows, values)
    run_kernel("feature_gradients", n_active, d_decoded, x, W_dec, *entries, d_W_enc, d_W_dec, d_b_enc, squares)
    return *(RowGradient(order.active, values) for values in (d_W_enc, d_b_enc, d_W_dec)), squares
