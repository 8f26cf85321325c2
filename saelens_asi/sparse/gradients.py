"""Forward and backward pass of TopK autoencoders that touch only the features that are active."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from saelens_asi.sparse import kernels
from saelens_asi.sparse.kernels import kernels_take
from saelens_asi.sparse.rows import (
    Activations,
    Entries,
    FeatureOrder,
    RowGradient,
    Workspace,
    total_norm,
    weighted_row_sum,
)
from saelens_asi.sparse.shards import Group


class TopKGradients(NamedTuple):
    """Gradients of a TopK autoencoder; ``b_dec`` is only what reaches it through the encoder's input.

    ``squares`` are the squared lengths of the rows of the other three together, where they are known.
    """

    W_enc: RowGradient
    b_enc: RowGradient
    W_dec: RowGradient
    b_dec: Float[Tensor, " d_in"]
    squares: Float[Tensor, " n_active"] | None = None

    def row_square(self) -> Float64[Tensor, ""]:
        """The squared length of the first three together."""
        if self.squares is None:
            return total_norm([self.W_enc.values, self.b_enc.values, self.W_dec.values]).square()
        return self.squares.sum(dtype=torch.float64)


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
    decoded: Float[Tensor, "n_tokens d_in"],
    bias: Float[Tensor, " d_in"],
    target: Float[Tensor, "n_tokens d_in"],
    workspace: Workspace,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n_tokens d_in"], Float[Tensor, " d_in"]]:
    """Add the bias in place; the mean squared distance to the target, and its gradients by decoded rows and bias.

    For tensors that ``kernels_take``: one look at each number, where autograd writes several tensors of their size.

    Args:
        decoded: each row without its bias; with it afterwards.
        bias: of the decoder.
        target: what was to be decoded.
        workspace: holds the gradient of the decoded rows until it is used for the next step.
    """
    n_tokens = decoded.shape[0]
    gradient, errors = workspace.take("decoded gradient", decoded.shape, decoded), decoded.new_empty(n_tokens)
    kernels.squared_errors_(decoded, bias, target, gradient=gradient, errors=errors, scale=2 / max(1, n_tokens))
    return errors.mean(), gradient, gradient.sum(dim=0)


def topk_gradients(
    activations: Activations,
    d_decoded: Float[Tensor, "n_rows d_in"],
    x: Float[Tensor, "n_tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    workspace: Workspace,
) -> TopKGradients:
    """Gradients of all parameters from those of ``activations.decode(W_dec)``.

    Every value of ``activations`` is taken to be ``x @ W_enc + b_enc`` at its place: features that ReLU holds at zero
    must not be among them.

    Args:
        activations: n_rows = n_levels * n_tokens, as of ``stack_levels``.
        d_decoded: gradient of the loss with respect to the decoded rows.
        x: what the encoder read.
        W_enc: of the encoder.
        W_dec: of the decoder.
        workspace: holds the results until it is used for the next step.

    Raises:
        ValueError: for another number of rows, and on a CPU for features that the weights do not have.
    """
    if activations.n_rows != d_decoded.shape[0]:
        raise ValueError(
            f"activations have {activations.n_rows} rows, and d_decoded {d_decoded.shape[0]}: give one each"
        )
    activations.check(W_dec.shape[0])
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
    activations: Activations,
    order: FeatureOrder,
    d_decoded: Float[Tensor, "n_rows d_in"],
    x: Float[Tensor, "n_tokens d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    workspace: Workspace,
) -> tuple[RowGradient, RowGradient, RowGradient, Float[Tensor, " n_active"]]:
    """Gradients of W_enc, b_enc and W_dec, and their squared lengths, from one look at each token of a feature."""
    n_active, values = order.active.numel(), activations.values[order.order]
    d_W_enc, d_W_dec = (workspace.take(f"{name} gradient", (n_active, x.shape[1]), x) for name in ("W_enc", "W_dec"))
    d_b_enc, squares = x.new_empty(2, n_active)
    kernels.feature_gradients(
        d_decoded,
        x,
        W_dec,
        order.active,
        order.starts,
        order.rows,
        values,
        d_encoder=d_W_enc,
        d_decoder=d_W_dec,
        d_bias=d_b_enc,
        squares=squares,
    )
    return *(RowGradient(order.active, values) for values in (d_W_enc, d_b_enc, d_W_dec)), squares


def merge_rows(gradients: TopKGradients, group: Group) -> TopKGradients:
    """The sum of the gradients by row of processes that hold the same features and have seen other tokens.

    Rows travel, not matrices: 2 d_in + 1 numbers and an index for each feature that fired in a process. Added up in the
    order of the processes, so that all get the same bits. ``b_dec`` stays this process's.
    """
    if group.size == 1:
        return gradients
    W_enc, b_enc, W_dec = gradients.W_enc, gradients.b_enc, gradients.W_dec
    d_in = W_enc.values.shape[1]
    own = torch.cat([W_enc.values, W_dec.values, b_enc.values[:, None].to(W_enc.values.dtype)], dim=1)
    rows_of, values_of = group.gather_rows(W_enc.rows), group.gather_rows(own)
    rows, places = torch.unique(torch.cat(rows_of), sorted=True, return_inverse=True)
    total = own.new_zeros(rows.numel(), own.shape[1])
    for at, values in zip(places.split([len(one) for one in rows_of]), values_of, strict=True):
        total.index_add_(0, at, values)  # a row once in each: the order of the sum is that of the processes
    return gradients._replace(
        W_enc=RowGradient(rows, total[:, :d_in]),
        W_dec=RowGradient(rows, total[:, d_in:-1]),
        b_enc=RowGradient(rows, total[:, -1]),
        squares=None,
    )
