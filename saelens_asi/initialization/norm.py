"""The norm of tied rows at which an untrained SAE reconstructs with the lowest error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelens_asi.activations.sae_state import give_statistics, shard_of, take_statistics
from saelens_asi.initialization.fresh_sae import FreshSAE, rescale_rows_

# Activations that the least-squares norm is fitted on; the norm moves by less than 1 % beyond it.
NORM_SAMPLE = 1024

# Values of a dense (tokens x d_sae) pre-activation matrix made at a time while fitting the norm.
MAX_DENSE_VALUES = 2**26
_MAX_NORM_STEPS = 8

# Of a factor that rows are scaled by.
_NORM_BITS = 12


def least_squares_norm_(sae: FreshSAE, sample: Tensor, fit: nn.Module | None) -> tuple[float, float]:
    """Scale unit rows to the norm with the lowest reconstruction error on ``sample``, under the activation function
    ``fit`` where given; returns it, and the squared error of the SAE at it.

    With tied rows of norm c the reconstruction is b + c^2 r, r the one at unit norm, as long as the same features
    are selected: c^2 = <x - b, r> / <r, r>. Where selection depends on the scale (JumpReLU's threshold) the same
    step is repeated from the new norm until it settles.

    Each factor is rounded to 12 significant bits: sums over processes round in another order, and the weights are to be
    the same. That moves c^2 by at most 2^-11, and since the error is flat at its minimum, this by at most 2^-22 of
    what the SAE explains.
    """
    if _selects_by_rank(sae, fit):
        both = reconstruct(sae, sample, fit)
        factor = both[0].best_factor(1.0)
        rescale_rows_(sae, factor)
        return factor, both[-1].error(factor**2)
    norm = 1.0
    for _ in range(_MAX_NORM_STEPS):
        with _activation_fn_replaced(sae, fit):
            (sums,) = reconstruct(sae, sample)
        factor = sums.best_factor(norm)
        rescale_rows_(sae, factor)
        norm *= factor
        if abs(factor - 1) < 1e-3:
            break
    if fit is None and abs(factor - 1) < 1e-6:
        return norm, sums.error(factor**2)
    (sums,) = reconstruct(sae, sample)  # other features may be selected than before the last step
    return norm, sums.error()


@dataclass
class _Sums:
    """Over a sample, in float64: x is relative to what the SAE puts out when no feature fires, and so is r, what it
    reconstructs.

    Attributes:
        target: of |x|^2.
        product: of <x, r>.
        square: of |r|^2.
    """

    target: float = 0.0
    product: float = 0.0
    square: float = 0.0

    def add(self, x: Float[Tensor, "n d_in"], r: Float[Tensor, "n d_in"]) -> None:
        self.target += float(x.square().sum())
        self.product += float((x * r).sum())
        self.square += float(r.square().sum())

    def error(self, scale: float = 1.0) -> float:
        """Of |x - scale * r|^2."""
        return self.target - 2 * scale * self.product + scale**2 * self.square

    def best_factor(self, norm: float) -> float:
        """By what to lengthen tied rows of ``norm`` for the lowest error, rounded.

        Raises ValueError where nothing lowers it.
        """
        if self.square == 0:
            raise ValueError(
                "norm='least_squares' found no reconstruction to scale: no feature fires on the sample at norm "
                f"{norm:.3g}. Give norm a number, or check the activation function's threshold"
            )
        if self.product <= 0:
            raise ValueError(
                f"norm='least_squares' found a reconstruction at norm {norm:.3g} that points away from the activations "
                "(no scale of it lowers the error): give norm a number, or check what the SAE's decoder adds"
            )
        return _rounded(math.sqrt(self.product / self.square))


def _rounded(value: float) -> float:
    """To ``_NORM_BITS`` significant bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, _NORM_BITS)), exponent - _NORM_BITS)


def reconstruct(sae: FreshSAE, sample: Tensor, fit: nn.Module | None = None) -> list[_Sums]:
    """One pass of the sample through the SAE, a few rows at a time: an encoding and a decoding.

    Returns the sums under the activation function ``fit``, where given, and under the SAE's own, last: both select from
    the one encoding.
    """
    rows = max(1, MAX_DENSE_VALUES // shard_of(sae).d_sae)  # the same in all processes, which encode together
    sums = [_Sums() for _ in range(1 if fit is None else 2)]
    offset: Tensor | None = None
    for x in torch.split(sample, rows):
        selections = _encode(sae, x, fit)
        statistics = take_statistics(sae)
        if offset is None or statistics:  # without statistics of the tokens it is the same for all
            offset = sae.decode(_nothing(sae)).double()
        for total, acts in zip(sums, selections, strict=True):
            give_statistics(sae, statistics)  # decode() has used them up
            total.add(x.double() - offset, sae.decode(acts).double() - offset)
    return sums


def _encode(sae: FreshSAE, x: Tensor, fit: nn.Module | None) -> list[Tensor]:
    """Activations under ``fit``, where given, and under the SAE's own function, in the form to be decoded."""
    if fit is None:
        return [_decodable(sae, sae.encode(x))]
    both = _Both(fit, sae.activation_fn, lambda acts: _decodable(sae, acts))
    with _activation_fn_replaced(sae, both):
        acts = _decodable(sae, sae.encode(x))
    return [acts, *both.of_second]


class _Both(nn.Module):
    """Two activation functions of the same scores: the first gives the output, the second's is kept."""

    def __init__(self, first: nn.Module, second: nn.Module, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._functions = (first, second)  # in a tuple they are no submodules
        self._form = form
        self.of_second: list[Tensor] = []

    def forward(self, scores: Tensor) -> Tensor:
        first, second = self._functions
        self.of_second = [self._form(second(scores))]
        acts: Tensor = first(scores)
        return acts


def _is_topk(sae: FreshSAE) -> bool:
    """Whether an SAE is of SAELens's TopK family, which alone has this setting."""
    return hasattr(sae.cfg, "rescale_acts_by_decoder_norm")


def _selects_by_rank(sae: FreshSAE, fit: nn.Module | None) -> bool:
    """Whether features stay the same at any norm of tied rows.

    An activation function of somebody else's may have a threshold: scores twice as large must give activations twice
    as large, to the bit.
    """
    if not _is_topk(sae):
        return False
    shard = shard_of(sae)
    scores = shard.own(torch.randn(2, shard.d_sae, generator=torch.Generator().manual_seed(0)), dim=1).to(sae.W_dec)
    functions = [sae.activation_fn, *([] if fit is None else [fit])]
    differ = [not torch.equal(2 * of(scores).to_dense(), of(2 * scores).to_dense()) for of in functions]
    return not any(shard.features.gather_objects(any(differ)))


def _decodes_sparsely(sae: FreshSAE) -> bool:
    """Whether ``sae.decode`` takes sparse activations, whose product torch has in these dtypes."""
    return _is_topk(sae) and sae.W_dec.dtype in (torch.float32, torch.float64)


def _decodable(sae: FreshSAE, acts: Tensor) -> Tensor:
    """Activations so that decoding them costs least."""
    if _decodes_sparsely(sae):
        return acts if acts.is_sparse else acts.to_sparse()
    return acts.to_dense()


def _nothing(sae: FreshSAE) -> Tensor:
    """The activations of one token on which no feature fires, whose decoding is without a product where it can be."""
    layout = torch.sparse_coo if _decodes_sparsely(sae) else torch.strided
    return torch.zeros(1, len(sae.W_dec), dtype=sae.W_dec.dtype, device=sae.W_dec.device, layout=layout)


@contextmanager
def _activation_fn_replaced(sae: FreshSAE, activation_fn: nn.Module | None) -> Iterator[None]:
    if activation_fn is None:
        yield
        return
    own = sae.activation_fn
    sae.activation_fn = activation_fn
    try:
        yield
    finally:
        sae.activation_fn = own
