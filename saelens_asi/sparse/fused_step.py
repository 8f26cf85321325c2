"""A TopK step on an accelerator: few launches, shapes that depend on no number, so that nothing waits for the device.

Each part is an operator (``operators.py``): what stands here are torch's operations, ``triton_kernels.py`` has the
kernels that take their place on a GPU. What is selected is ``fused_topk.py``'s.

Entries are n_tokens x k: a feature that ReLU holds at zero stays among them with a value of zero, and counts nowhere.
No kernel adds with atomics, and sums have a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int32, Int64
from torch import Tensor

from saelens_asi.sparse.operators import operator
from saelens_asi.sparse.rows import bag_sums

# Tokens whose decoder rows are held at once, in the twin of the decoding.
_TWIN_TOKENS = 128

# Entries of a feature that fires often are added up in pieces of so many, by different programs of a kernel.
TILE_OF_ENTRIES = 64

# Rows of a table as wide as this at most fit in the registers of a kernel.
MAX_WIDTH = 8192


class Decoded(NamedTuple):
    """What one look at the decoder rows of each token gives.

    Attributes:
        out: reconstructions.
        d_out: gradient of the mean over tokens of the squared error, by ``out``.
        errors: squared error of each token.
        acts: scores of the active entries; zero for others, here and in the next two.
        values: by which decoder rows are multiplied: ``acts / scale``.
        d_values: gradient by these.
        owners: feature of each active entry, d_sae for others.
    """

    out: Float[Tensor, "n_tokens d_in"]
    d_out: Float[Tensor, "n_tokens d_in"]
    errors: Float[Tensor, " n_tokens"]
    acts: Float[Tensor, "n_tokens k"]
    values: Float[Tensor, "n_tokens k"]
    d_values: Float[Tensor, "n_tokens k"]
    owners: Int32[Tensor, "n_tokens k"]


@operator(
    "(Tensor scores, Tensor features, Tensor? scale, Tensor W_dec, Tensor b_dec, Tensor target, bool magnitude) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def decode_tokens(
    scores: Float[Tensor, "n_tokens k"],
    features: Int64[Tensor, "n_tokens k"],
    scale: Float[Tensor, " d_sae"] | None,
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    target: Float[Tensor, "n_tokens d_in"],
    magnitude: bool,
) -> tuple[Tensor, ...]:
    """The fields of ``Decoded``, in their order. One launch.

    Args:
        scores: as of ``fused_topk.encode_top_k``; those that are not positive (with ``magnitude``: not zero) count as
            none, while one that is not a number counts.
        features: of the scores.
        scale: that the scores have been multiplied by.
        W_dec: of the decoder.
        b_dec: of the decoder.
        target: what is to be decoded.
        magnitude: scores keep their sign.
    """
    n_tokens, k = scores.shape
    active = scores != 0 if magnitude else ~(scores <= 0)
    acts = torch.where(active, scores, 0)
    values = acts if scale is None else torch.where(active, scores / scale[features], 0)
    bags = torch.arange(0, n_tokens * k + 1, k, device=scores.device)
    out = bag_sums(W_dec, features.flatten(), bags, values.flatten()) + b_dec
    difference = out - target
    d_out, errors = difference * (2 / n_tokens), difference.square().sum(dim=1)
    parts = [(d_out[i : i + _TWIN_TOKENS], features[i : i + _TWIN_TOKENS]) for i in range(0, n_tokens, _TWIN_TOKENS)]
    products = torch.cat([torch.einsum("td,tkd->tk", d_rows, W_dec[those]) for d_rows, those in parts])
    owners = torch.where(active, features, W_dec.shape[0]).int()
    return out, d_out, errors, acts, values.clone(), torch.where(active, products, 0), owners


@dataclass(frozen=True)
class FusedEntries:
    """Entries in the order of their features, and what the gradients of a row are made of.

    Attributes:
        starts: where the entries of each feature begin; those without an active entry end there too. The last number
            is that of all active entries.
        order: position of each entry in (n_tokens, k), which is flat; a feature's are in the order of the tokens.
        values: see ``Decoded``.
        d_values: see ``Decoded``.
        d_out: see ``Decoded``.
        x: what the encoder read.
        tile_rows: see ``sum_tiles``.
        tile_bias: see ``sum_tiles``.
    """

    starts: Int64[Tensor, " d_sae_and_1"]
    order: Int64[Tensor, " n_entries"]
    values: Float[Tensor, "n_tokens k"]
    d_values: Float[Tensor, "n_tokens k"]
    d_out: Float[Tensor, "n_tokens d_in"]
    x: Float[Tensor, "n_tokens d_in"]
    tile_rows: Float[Tensor, "n_tiles 2 d_in"]
    tile_bias: Float[Tensor, " n_tiles"]

    @classmethod
    def of(cls, decoded: Decoded, x: Float[Tensor, "n_tokens d_in"], features: Int32[Tensor, " d_sae_and_1"]) -> Any:
        """Sort them.

        Args:
            decoded: of the step.
            x: what the encoder read.
            features: all numbers from 0 to d_sae.
        """
        owners, order = torch.sort(decoded.owners.flatten(), stable=True)
        starts = torch.searchsorted(owners, features)
        made = (order, decoded.values, decoded.d_values, decoded.d_out, x)
        return cls(starts, *made, *sum_tiles(owners, *made, features.numel() - 1))

    def firings(self) -> Int64[Tensor, " d_sae"]:
        """On how many tokens each feature is active."""
        return self.starts.diff()

    def parts(self) -> tuple[Tensor, ...]:
        """As the operators take them."""
        return (
            self.starts,
            self.order,
            self.values,
            self.d_values,
            self.d_out,
            self.x,
            self.tile_rows,
            self.tile_bias,
        )


@operator(
    "(Tensor owners, Tensor order, Tensor values, Tensor d_values, Tensor d_out, Tensor x, int d_sae) -> "
    "(Tensor, Tensor)"
)
def sum_tiles(
    owners: Int32[Tensor, " n_entries"],
    order: Int64[Tensor, " n_entries"],
    values: Float[Tensor, "n_tokens k"],
    d_values: Float[Tensor, "n_tokens k"],
    d_out: Float[Tensor, "n_tokens d_in"],
    x: Float[Tensor, "n_tokens d_in"],
    d_sae: int,
) -> tuple[Float[Tensor, "n_tiles 2 d_in"], Float[Tensor, " n_tiles"]]:
    """Sums over the tiles of ``TILE_OF_ENTRIES`` sorted entries that belong to one feature; zeros for other tiles.

    A feature may fire on every token: its whole tiles are added up here, by a program each, and no later pass has
    more than two parts of a tile and these sums to look at. One launch.

    Returns:
        Sums of ``values * d_out`` and of ``d_values * x`` (n_tiles, 2, d_in), and of ``d_values``. What is left over at
        the end of the entries is no tile.
    """
    n_tiles = owners.numel() // TILE_OF_ENTRIES
    by_tile = owners[: n_tiles * TILE_OF_ENTRIES].view(n_tiles, TILE_OF_ENTRIES)
    is_whole = ((by_tile[:, 0] == by_tile[:, -1]) & (by_tile[:, 0] < d_sae)).to(x.dtype)
    order = order[: n_tiles * TILE_OF_ENTRIES]
    tokens = order.div(values.shape[1], rounding_mode="floor")
    bags = torch.arange(0, n_tiles * TILE_OF_ENTRIES + 1, TILE_OF_ENTRIES, device=x.device)
    sums = [
        bag_sums(source, tokens, bags, weights.flatten()[order]) for source, weights in ((d_out, values), (x, d_values))
    ]
    bias = d_values.flatten()[order].view(n_tiles, TILE_OF_ENTRIES).sum(dim=1)
    # Not a product with zero, which keeps what is not a number.
    whole = is_whole.bool()
    return torch.where(whole[:, None, None], torch.stack(sums, dim=1), 0), torch.where(whole, bias, 0)


def _row_gradients(
    starts: Int64[Tensor, " d_sae_and_1"],
    order: Int64[Tensor, " n_entries"],
    values: Float[Tensor, "n_tokens k"],
    d_values: Float[Tensor, "n_tokens k"],
    d_out: Float[Tensor, "n_tokens d_in"],
    x: Float[Tensor, "n_tokens d_in"],
) -> tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, "d_sae d_in"], Float[Tensor, " d_sae"]]:
    """Gradients of W_dec, W_enc and b_enc, row by row, zeros included: a twin has no smaller shape to give them."""
    tokens = order.div(values.shape[1], rounding_mode="floor")
    d_values = d_values.flatten()[order]
    d_W_dec = bag_sums(d_out, tokens, starts, values.flatten()[order])
    d_W_enc = bag_sums(x, tokens, starts, d_values)
    d_b_enc = bag_sums(x.new_ones(x.shape[0], 1), tokens, starts, d_values)
    return d_W_dec, d_W_enc, d_b_enc.squeeze(1)


@operator(
    "(Tensor starts, Tensor order, Tensor values, Tensor d_values, Tensor d_out, Tensor x, Tensor tile_rows, "
    "Tensor tile_bias, Tensor W_enc) -> (Tensor, Tensor)"
)
def gradient_squares(
    starts: Int64[Tensor, " d_sae_and_1"],
    order: Int64[Tensor, " n_entries"],
    values: Float[Tensor, "n_tokens k"],
    d_values: Float[Tensor, "n_tokens k"],
    d_out: Float[Tensor, "n_tokens d_in"],
    x: Float[Tensor, "n_tokens d_in"],
    tile_rows: Float[Tensor, "n_tiles 2 d_in"],
    tile_bias: Float[Tensor, " n_tiles"],
    W_enc: Float[Tensor, "d_sae d_in"],
) -> tuple[Float[Tensor, " n_parts"], Float[Tensor, "n_parts d_in"]]:
    """The squared length of the gradients of W_enc, b_enc and W_dec, and the gradient that reaches the input of the
    encoder, summed over tokens: both in parts that are yet to be added up. One launch; no gradient is written.

    ``W_enc`` has a row for each feature; the other arguments are the fields of ``FusedEntries``.
    """
    d_W_dec, d_W_enc, d_b_enc = _row_gradients(starts, order, values, d_values, d_out, x)
    squares = d_W_dec.square().sum() + d_W_enc.square().sum() + d_b_enc.square().sum()
    return squares[None], (d_b_enc @ W_enc)[None]


@operator("(Tensor squares, Tensor d_b_dec, Tensor d_input, float max_norm) -> (Tensor, Tensor, Tensor)")
def clip(
    squares: Float[Tensor, " n_parts"],
    d_b_dec: Float[Tensor, " d_in"],
    d_input: Float[Tensor, " d_in"],
    max_norm: float,
) -> tuple[Float[Tensor, " d_in"], Float64[Tensor, ""], Float[Tensor, ""]]:
    """Clipping by the norm of all gradients, as ``torch.nn.utils.clip_grad_norm_`` has it. One launch.

    Args:
        squares: see ``gradient_squares``.
        d_b_dec: gradient that reaches b_dec through the reconstruction.
        d_input: gradient by the encoder's input, from which b_dec is subtracted; zeros where it is not.
        max_norm: that is left as it is.

    Returns:
        The gradient of b_dec, divided; the norm before clipping; and what all gradients are to be divided by.
    """
    gradient = d_b_dec - d_input
    norm = (squares.sum(dtype=torch.float64) + gradient.double().square().sum()).sqrt()
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0).to(gradient.dtype)
    return gradient / divisor, norm, divisor


@operator(
    "(Tensor(a!)[] tensors, Tensor(b!)[] last_steps, Tensor starts, Tensor order, Tensor values, Tensor d_values, "
    "Tensor d_out, Tensor x, Tensor tile_rows, Tensor tile_bias, Tensor divisor, float[] numbers, int step) -> ()",
    mutates=("tensors", "last_steps"),
)
def move_rows_(
    tensors: list[Tensor],
    last_steps: list[Tensor],
    starts: Int64[Tensor, " d_sae_and_1"],
    order: Int64[Tensor, " n_entries"],
    values: Float[Tensor, "n_tokens k"],
    d_values: Float[Tensor, "n_tokens k"],
    d_out: Float[Tensor, "n_tokens d_in"],
    x: Float[Tensor, "n_tokens d_in"],
    tile_rows: Float[Tensor, "n_tiles 2 d_in"],
    tile_bias: Float[Tensor, " n_tiles"],
    divisor: Float[Tensor, ""],
    numbers: list[float],
    step: int,
) -> None:
    """Make the gradients of the rows that fired, and move these by Adam; all other rows keep their bits. One launch.

    Args:
        tensors: W_enc (d_sae, d_in), b_enc (d_sae,), W_dec (d_sae, d_in), the first moments of the three, the second.
        last_steps: (d_sae,) int32, of which step the moments of each row of the three are: what they lose by their
            silence since is made good, and they are of this step then. Empty where silence takes nothing from them.
        starts: and what follows are the fields of ``FusedEntries``.
        divisor: of the gradients.
        numbers: see ``AdamNumbers``.
        step: steps taken, this one included.
    """
    fired = starts.diff() > 0
    d_W_dec, d_W_enc, d_b_enc = _row_gradients(starts, order, values, d_values, d_out, x)
    for i, gradient in enumerate((d_W_enc, d_b_enc, d_W_dec)):
        here = fired if gradient.ndim == 1 else fired[:, None]
        moved = tensors[i], tensors[i + 3], tensors[i + 6]
        param, exp_avg, exp_avg_sq = moved
        if last_steps:
            silent = (step - 1 - last_steps[i]).view(here.shape)
            exp_avg, exp_avg_sq = exp_avg * numbers[2] ** silent, exp_avg_sq * numbers[3] ** silent
            last_steps[i].masked_fill_(fired, step)
        for tensor, new in zip(moved, _adam(param, exp_avg, exp_avg_sq, gradient / divisor, numbers), strict=True):
            tensor.copy_(torch.where(here, new, tensor))


def _adam(
    param: Float[Tensor, " *shape"],
    exp_avg: Float[Tensor, " *shape"],
    exp_avg_sq: Float[Tensor, " *shape"],
    gradient: Float[Tensor, " *shape"],
    numbers: Sequence[float],
) -> tuple[Float[Tensor, " *shape"], Float[Tensor, " *shape"], Float[Tensor, " *shape"]]:
    step_size, root_scale, beta1, beta2, eps = numbers
    first = beta1 * exp_avg + (1 - beta1) * gradient
    second = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
    return param - step_size * first / (second.sqrt() * root_scale + eps), first, second


@operator(
    "(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor gradient, float[] numbers) -> ()",
    mutates=("param", "exp_avg", "exp_avg_sq"),
)
def move_vector_(
    param: Float[Tensor, " n"],
    exp_avg: Float[Tensor, " n"],
    exp_avg_sq: Float[Tensor, " n"],
    gradient: Float[Tensor, " n"],
    numbers: list[float],
) -> None:
    """One Adam step of a vector in place. One launch. ``numbers``: see ``AdamNumbers``."""
    moved = (param, exp_avg, exp_avg_sq)
    for tensor, new in zip(moved, _adam(*moved, gradient, numbers), strict=True):
        tensor.copy_(new)


class AdamNumbers(NamedTuple):
    """What an Adam step asks for, bias corrections included.

    Attributes:
        step_size: ``lr / (1 - beta1^step)``.
        root_scale: ``1 / sqrt(1 - beta2^step)``.
        beta1: decay of the first moment.
        beta2: decay of the second.
        eps: added to the root of the second.
    """

    step_size: float
    root_scale: float
    beta1: float
    beta2: float
    eps: float

    @classmethod
    def of(cls, lr: float, beta1: float, beta2: float, eps: float, step: float) -> AdamNumbers:
        return cls(lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), beta1, beta2, eps)


@operator("(Tensor(a!) norms, Tensor table, Tensor starts) -> ()", mutates=("norms",))
def renew_norms_(norms: Float[Tensor, " n"], table: Float[Tensor, "n d"], starts: Int[Tensor, " n_and_1"]) -> None:
    """Renew the norms of the rows whose part of ``starts`` is not empty, to bits that do not depend on which these are.

    One launch.
    """
    found = torch.linalg.vector_norm(table, dim=1)
    norms.copy_(torch.where(starts.diff() > 0, found, norms))


@dataclass
class FusedUpdate:
    """Moves the rows of an autoencoder that fired, and its decoder bias: a ``RowUpdate`` of ``SparseAdam``.

    Attributes:
        params: W_enc (d_in, d_sae), with a feature's weights side by side in memory; b_enc; W_dec (d_sae, d_in); b_dec.
        entries: of the step.
        d_b_dec: gradient of b_dec, divided.
        divisor: of the other gradients.
        norms: of the decoder rows, to be renewed; None for none.
    """

    params: Sequence[Tensor]
    entries: FusedEntries
    d_b_dec: Float[Tensor, " d_in"]
    divisor: Float[Tensor, ""]
    norms: Float[Tensor, " d_sae"] | None = field(default=None)

    def apply_(
        self,
        moments: Sequence[tuple[Tensor, Tensor]],
        settings: Sequence[Any],
        steps: Sequence[float],
        last_steps: Sequence[Tensor | None],
    ) -> None:
        """See ``RowUpdate.apply_``.

        Raises:
            ValueError: where settings or steps of the parameters differ, where some of them have moments that decay
                in silence and others do not, or where a feature's weights of W_enc or of its moments do not lie side
                by side.
        """
        lr, beta1, beta2, eps = settings[0][:4]
        if any(other[:4] != settings[0][:4] for other in settings) or len(set(steps)) > 1:
            raise ValueError(
                f"settings {settings} and steps {steps} of the parameters of one step differ: make them equal"
            )
        decaying = [last_step for last_step in last_steps[:3] if last_step is not None]
        if len(decaying) not in (0, 3):
            raise ValueError("the moments of some parameters decay in silence, of others not: set one silent_moments")
        numbers = list(AdamNumbers.of(float(lr), beta1, beta2, eps, steps[0]))
        by_kind = list(zip(self.params, *zip(*moments, strict=True), strict=True))
        rows = [tensor.detach().t() for tensor in by_kind[0]]
        if not all(tensor.is_contiguous() for tensor in (*rows, *by_kind[2])):
            raise ValueError("a feature's weights must lie side by side in memory: W_enc transposed, and W_dec")
        tensors = [tensor for triple in zip(rows, *by_kind[1:3], strict=True) for tensor in triple]
        move_rows_(tensors, decaying, *self.entries.parts(), self.divisor, numbers, int(steps[0]))
        move_vector_(*by_kind[3], self.d_b_dec, numbers)
        if self.norms is not None:
            renew_norms_(self.norms, by_kind[2][0], self.entries.starts)
