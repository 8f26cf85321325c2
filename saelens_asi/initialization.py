"""Active Subspace Initialization: settings, subspace, weights, and the record of it (arXiv 2508.16929)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from saelens_asi.activations.sae_state import give_statistics, take_statistics
from saelens_asi.sparse.shards import Shard
from saelens_asi.spectra.spectrum import Spectrum

INITIALIZER_NAME = "active_subspace"

# "auto" settings: the least and the largest share of d_in that the subspace has, and up to how many features for each
# dimension of d_in it is the least; the share of the variance behind which there is nothing to start in, and the
# dimensions that are taken at least; tokens for each dimension of d_in.
_LEAST_SHARE, _LARGEST_SHARE, _UNCROWDED = 1 / 8, 1 / 4, 14
_AUTO_VARIANCE, _AUTO_LEAST = 0.99, 16
AUTO_TOKENS_PER_DIMENSION = 32

# Share of the variance that reports and Lorsa's "auto" go by.
AUTO_VARIANCE_SHARE = 0.9

_SUBSPACES = ("active", "random", "full")
_CENTERS = ("mean", "zeros")
_NAMED_NORMS = ("least_squares", "decoder_init_norm")


@dataclass(frozen=True, kw_only=True)
class ActiveSubspaceInit:
    """Settings of Active Subspace Initialization. Frozen and inert: nothing happens before training starts.

    Decoder rows start as random directions inside the top ``d_init`` principal directions of the mean-centred
    activations, all of one norm; the encoder starts as the decoder's transpose (arXiv 2508.16929). Three things are
    set apart, since each has its own effect: the subspace, the norm, and the centre.

    The defaults are those that measured best on a real model (benchmarks/results/ablation.md);
    ``ActiveSubspaceInit.paper()`` is the paper's own recipe.

    Attributes:
        d_init: dimension of the subspace: an int, a fraction of d_in in (0, 1] given as a float, or ``"auto"``: an
            eighth of d_in, and up to a quarter for large dictionaries and for BatchTopK (``auto_d_init``).
        n_tokens: activation vectors used for the estimate, or ``"auto"``: 32 for each dimension of d_in. They are
            streamed, so memory does not grow with them.
        norm: norm of the decoder rows: ``"least_squares"`` (closed form for the lowest initial reconstruction error;
            for BatchTopK, for that with k features at every token), a positive number, or ``"decoder_init_norm"``
            (SAELens's own setting of that name).
        center: decoder bias at the ``"mean"`` of the activations, or ``"zeros"``.
        subspace: ``"active"``; or the controls ``"random"`` (same dimension) and ``"full"`` (all of d_in).
        seed: of the random directions. They have their own generator: no other randomness is touched.
        spectrum: path of a file written by ``Spectrum.save`` for the raw activations of the same hook. The subspace
            and the mean are then taken from it, and only a small sample of activations is read, for the norm.
    """

    d_init: int | float | Literal["auto"] = "auto"
    n_tokens: int | Literal["auto"] = "auto"
    norm: float | Literal["least_squares", "decoder_init_norm"] = "least_squares"
    center: Literal["mean", "zeros"] = "mean"
    subspace: Literal["active", "random", "full"] = "active"
    seed: int = 0
    spectrum: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.spectrum, Path):
            object.__setattr__(self, "spectrum", str(self.spectrum))
        if self.spectrum is not None and not isinstance(self.spectrum, str):
            raise ValueError(f"spectrum={self.spectrum!r} must be the path of a spectrum file; save the spectrum first")
        _check_d_init(self.d_init)
        _check_choice("center", self.center, _CENTERS)
        _check_choice("subspace", self.subspace, _SUBSPACES)
        if self.n_tokens != "auto" and not (_is_int(self.n_tokens) and self.n_tokens >= 2):
            raise ValueError(f"n_tokens={self.n_tokens!r} must be an integer of at least 2, or 'auto'")
        if not _is_int(self.seed):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        if self.norm not in _NAMED_NORMS and not (_is_real(self.norm) and 0 < self.norm < math.inf):
            raise ValueError(f"norm={self.norm!r} must be a positive number, or one of {_NAMED_NORMS}")
        if _is_int(self.d_init) and _is_int(self.n_tokens):
            self._check_enough_tokens(self.d_init, self.n_tokens)

    def _check_enough_tokens(self, d_init: int, n_tokens: int) -> None:
        if self.subspace == "active" and self.spectrum is None and n_tokens <= d_init:
            raise ValueError(
                f"n_tokens={n_tokens} is too few for d_init={d_init}: n centred vectors span at most n - 1 dimensions; "
                f"give at least {d_init + 1} tokens ({AUTO_TOKENS_PER_DIMENSION} for each dimension of d_in is better)"
            )

    @classmethod
    def paper(cls, **changes: Any) -> ActiveSubspaceInit:
        """The paper's recipe: d_init = 768 / 4096 = 18.75 % of d_in, zero decoder bias, error-minimising norm."""
        return cls(**{"d_init": 0.1875, "center": "zeros", "norm": "least_squares", **changes})

    def check_width(self, d_in: int) -> None:
        """Raise ValueError when these settings cannot fit activations of width ``d_in``."""
        if _is_int(self.d_init) and self.d_init > d_in:
            raise ValueError(
                f"d_init={self.d_init} exceeds d_in={d_in}: give an int of at most {d_in}, a fraction such as "
                "0.2, or 'auto'"
            )
        if isinstance(self.d_init, float) and round(self.d_init * d_in) < 1:
            raise ValueError(f"d_init={self.d_init} of d_in={d_in} is less than one dimension: give a larger fraction")
        if isinstance(self.d_init, float):
            self._check_enough_tokens(round(self.d_init * d_in), self.tokens_for(d_in))

    def tokens_for(self, d_in: int) -> int:
        """Number of activation vectors for the estimate at width ``d_in``."""
        return AUTO_TOKENS_PER_DIMENSION * d_in if self.n_tokens == "auto" else int(self.n_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ActiveSubspaceInit:
        """Inverse of ``to_dict``. Raises ValueError for a setting that does not exist."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"ActiveSubspaceInit has no setting {unknown}; its settings are {known}")
        return cls(**values)


def auto_share(d_in: int, d_sae: int, over_batch: bool = False) -> float:
    """Of d_in, how many dimensions ``d_sae`` features start in where none are asked for.

    An eighth up to fourteen features for each dimension of d_in; from there on as the square root of their number, up
    to a quarter: features crowd, and die of each other. A dimension that is too low loses features, one that is too
    high error (docs/claims.md: what was tried at hooks of two models, and at four sizes).

    A quarter where features are selected over a whole batch (BatchTopK): one threshold for all tokens leaves those
    behind that crowd, and more of them the longer the run (docs/claims.md, "BatchTopK").
    """
    if over_batch:
        return _LARGEST_SHARE
    return min(_LARGEST_SHARE, _LEAST_SHARE * math.sqrt(max(1.0, d_sae / (_UNCROWDED * d_in))))


def auto_d_init(spectrum: Spectrum, d_sae: int, over_batch: bool = False) -> int:
    """Dimension of the subspace for ``d_sae`` features where none is asked for; ``over_batch``: of a BatchTopK.

    ``auto_share`` of d_in; no more than hold 99 % of the variance, but sixteen at least where the sample has them. How
    much variance they hold says little else: the tail in which features live counts for little in it.
    """
    wanted = max(_AUTO_LEAST, round(auto_share(spectrum.d, d_sae, over_batch) * spectrum.d))
    return min(wanted, spectrum.intrinsic_dimension(_AUTO_VARIANCE), max(1, spectrum.rank))


def choose_d_init(
    settings: ActiveSubspaceInit, spectrum: Spectrum, d_sae: int | None = None, over_batch: bool = False
) -> int:
    """Dimension of the subspace for activations with this spectrum, and ``d_sae`` features (``over_batch``: of a
    BatchTopK).

    ``"auto"`` without a ``d_sae`` is the smallest dimension that holds 90 % of the variance.

    Raises ValueError when it exceeds d_in, or the rank of the sample.
    """
    d_in = spectrum.d
    settings.check_width(d_in)
    if settings.subspace == "full":
        return d_in
    if settings.d_init == "auto" and d_sae is not None:
        d_init = auto_d_init(spectrum, d_sae, over_batch)
    elif settings.d_init == "auto":
        d_init = spectrum.intrinsic_dimension(AUTO_VARIANCE_SHARE)
    elif _is_int(settings.d_init):
        d_init = settings.d_init
    else:
        d_init = round(float(settings.d_init) * d_in)
    if settings.subspace == "active" and d_init > spectrum.rank:
        raise ValueError(
            f"d_init={d_init} exceeds the rank {spectrum.rank} of {spectrum.n_tokens} centred activations of width "
            f"{d_in}: give more n_tokens, or a lower d_init"
        )
    return d_init


def subspace_basis(
    settings: ActiveSubspaceInit,
    spectrum: Spectrum,
    generator: torch.Generator,
    d_sae: int | None = None,
    over_batch: bool = False,
) -> Float64[Tensor, "d_in d_init"] | None:
    """(d_in, d_init) orthonormal float64 columns that span what ``choose_d_init`` asks for; None for all of d_in."""
    d_init = choose_d_init(settings, spectrum, d_sae, over_batch)
    if settings.subspace == "full":
        return None
    if settings.subspace == "random":
        gaussian = torch.randn(spectrum.d, d_init, generator=generator, dtype=torch.float64)
        basis: Tensor = torch.linalg.qr(gaussian)[0]
        return basis
    return spectrum.principal_directions(d_init)


# Rows of weights that are drawn at a time.
_CHUNK = 65_536


def random_directions_(
    out: Float[Tensor, "n_features d_in"],
    basis: Float[Tensor, "d_in d_init"] | None,
    generator: torch.Generator,
    shard: Shard | None = None,
    chunk: int = _CHUNK,
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


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_choice(setting: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{setting}={value!r} must be one of {choices}")


def _check_d_init(d_init: object) -> None:
    if d_init == "auto":
        return
    if not _is_real(d_init):
        raise ValueError(f"d_init={d_init!r} must be an int, a fraction of d_in in (0, 1], or 'auto'")
    if _is_int(d_init):
        if d_init < 1:
            raise ValueError(f"d_init={d_init} must be at least 1, a fraction of d_in in (0, 1], or 'auto'")
    elif not 0 < d_init <= 1:
        raise ValueError(f"d_init={d_init} as a fraction of d_in must lie in (0, 1]; for a dimension give an int")


# Activations that the least-squares norm is fitted on; the norm moves by less than 1 % beyond it.
NORM_SAMPLE = 1024

# Values of a dense (tokens x d_sae) pre-activation matrix made at a time while fitting the norm.
_MAX_DENSE_VALUES = 2**26
_MAX_NORM_STEPS = 8

# Of a factor that rows are scaled by.
_NORM_BITS = 12


class FreshSAE(Protocol):
    """What is used of a SAELens training SAE, of whichever architecture."""

    W_dec: Tensor
    W_enc: Tensor
    b_dec: Tensor
    activation_fn: nn.Module

    @property
    def cfg(self) -> Any: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Initialization:
    """What an initialization did.

    Attributes:
        d_init: dimension of the subspace.
        variance_explained: share of the activations' variance inside it.
        norm: norm of the decoder rows.
        initial_nmse: E|x - x_hat|^2 / E|x - E x|^2 on the sample, in the space that the encoder sees.
    """

    d_init: int
    variance_explained: float
    norm: float
    initial_nmse: float

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def initialize_(
    sae: FreshSAE,
    settings: ActiveSubspaceInit,
    spectrum: Spectrum,
    sample: Float[Tensor, "n d_in"],
    fit_activation_fn: nn.Module | None = None,
    over_batch: bool = False,
) -> Initialization:
    """Initialize ``W_dec``, ``W_enc`` and the biases of a freshly made training SAE.

    Of an SAE whose features are spread over processes each initialises its own, as one process would: they all call
    this. Of them ``encode`` gives a process its own columns, and ``decode`` sums over all.

    Args:
        sae: any SAELens training SAE: ``W_dec`` (d_sae, d_in), ``W_enc`` (d_in, d_sae) unless tied, ``b_dec`` (d_in,).
            One with a part of the features says in ``shard`` which.
        settings: what to do.
        spectrum: of the activations in the space that the encoder sees.
        sample: (n, d_in) activations as the SAE's ``encode`` takes them.
        fit_activation_fn: takes the place of the SAE's own activation function while the norm is fitted.
        over_batch: whether the SAE selects features over a whole batch.

    Raises:
        ValueError: for weights that are not fresh, or settings that do not suit the SAE or the spectrum.
    """
    check_fresh(sae)
    norm = _fixed_norm(sae, settings)
    _check_center(sae, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    basis = subspace_basis(settings, spectrum, generator, _shard(sae).d_sae, over_batch)
    d_in = spectrum.d
    random_directions_(sae.W_dec.data, basis, generator, _shard(sae))
    _tie_encoder_(sae)
    _set_center_(sae, spectrum.mean if settings.center == "mean" else torch.zeros_like(spectrum.mean))
    if norm is None:
        norm, error = _least_squares_norm_(sae, sample, fit_activation_fn)
    else:
        _rescale_rows_(sae, norm)
        error = _reconstruct(sae, sample)[-1].error()
    variance = float((sample.double() - sample.double().mean(dim=0)).square().sum())

    inside = spectrum.covariance if basis is None else basis.T @ spectrum.covariance.to(basis) @ basis
    return Initialization(
        d_init=d_in if basis is None else basis.shape[1],
        variance_explained=float(inside.trace()) / spectrum.total_variance,
        norm=norm,
        initial_nmse=error / variance,
    )


def _shard(sae: FreshSAE) -> Shard:
    """Which features lie here; where the SAE does not say, all."""
    return getattr(sae, "shard", None) or Shard.whole(len(sae.W_dec))


def check_fresh(sae: FreshSAE) -> None:
    """Raise ValueError for an SAE that was trained or loaded: an initialization would overwrite it."""
    if bool(sae.b_dec.any()):
        raise ValueError(
            "initializer='active_subspace' would overwrite this SAE's weights, which are not freshly initialised "
            "(b_dec is not zero): set initializer='default' to train them on, or pass a new SAE"
        )


def _check_center(sae: FreshSAE, settings: ActiveSubspaceInit) -> None:
    if settings.center == "mean" and not sae.cfg.apply_b_dec_to_input and not _shifted_biases(sae):
        raise ValueError(
            f"center='mean' needs apply_b_dec_to_input=True for {type(sae).__name__}, which has no encoder bias that "
            "could take its place: set that, or center='zeros'"
        )


def _is_tied(sae: FreshSAE) -> bool:
    return not isinstance(getattr(sae, "W_enc", None), nn.Parameter)


def _fixed_norm(sae: FreshSAE, settings: ActiveSubspaceInit) -> float | None:
    """The norm where it is known beforehand; None where it is to be fitted."""
    own_norm: float | None = sae.cfg.decoder_init_norm
    if _is_tied(sae):  # matching pursuit projects on the rows themselves: only unit rows make sense
        if settings.norm not in ("least_squares", "decoder_init_norm", own_norm):
            raise ValueError(
                f"norm={settings.norm} does not suit {type(sae).__name__}, whose encoder is its decoder and whose rows "
                f"have norm {own_norm}: leave norm at 'least_squares'"
            )
        return own_norm
    if settings.norm == "least_squares":
        return None
    if settings.norm != "decoder_init_norm":
        return float(settings.norm)
    if own_norm is None:
        raise ValueError("norm='decoder_init_norm', but decoder_init_norm=None: give it a number, or norm a number")
    return own_norm


def _tie_encoder_(sae: FreshSAE) -> None:
    if not _is_tied(sae):
        sae.W_enc.data.copy_(sae.W_dec.data.T)


def _rescale_rows_(sae: FreshSAE, factor: float) -> None:
    sae.W_dec.data.mul_(factor)
    if not _is_tied(sae):
        sae.W_enc.data.mul_(factor)
        for name in _shifted_biases(sae):
            getattr(sae, name).data.mul_(factor)


def _shifted_biases(sae: FreshSAE) -> list[str]:
    """Encoder biases that stand in for the centring of the input where SAELens does not subtract b_dec."""
    if sae.cfg.apply_b_dec_to_input:
        return []
    return [name for name in ("b_enc", "b_gate", "b_mag") if isinstance(getattr(sae, name, None), nn.Parameter)]


def _set_center_(sae: FreshSAE, center: Tensor) -> None:
    """Put the decoder bias at ``center``, and make the encoder see activations relative to it."""
    sae.b_dec.data.copy_(center)
    if not sae.cfg.apply_b_dec_to_input and bool(center.any()):
        names = _shifted_biases(sae)
        for start in range(0, len(sae.W_dec), _CHUNK):
            # A sum for each feature, and no product, whose bits may depend on how many features there are.
            shift = (sae.W_dec.data[start : start + _CHUNK] * sae.b_dec.data).sum(dim=1)
            for name in names:
                getattr(sae, name).data[start : start + _CHUNK].copy_(-shift)


def _least_squares_norm_(sae: FreshSAE, sample: Tensor, fit: nn.Module | None) -> tuple[float, float]:
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
        both = _reconstruct(sae, sample, fit)
        factor = both[0].best_factor(1.0)
        _rescale_rows_(sae, factor)
        return factor, both[-1].error(factor**2)
    norm = 1.0
    for _ in range(_MAX_NORM_STEPS):
        with _activation_fn_replaced(sae, fit):
            (sums,) = _reconstruct(sae, sample)
        factor = sums.best_factor(norm)
        _rescale_rows_(sae, factor)
        norm *= factor
        if abs(factor - 1) < 1e-3:
            break
    if fit is None and abs(factor - 1) < 1e-6:
        return norm, sums.error(factor**2)
    (sums,) = _reconstruct(sae, sample)  # other features may be selected than before the last step
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


def _reconstruct(sae: FreshSAE, sample: Tensor, fit: nn.Module | None = None) -> list[_Sums]:
    """One pass of the sample through the SAE, a few rows at a time: an encoding and a decoding.

    Returns the sums under the activation function ``fit``, where given, and under the SAE's own, last: both select from
    the one encoding.
    """
    rows = max(1, _MAX_DENSE_VALUES // _shard(sae).d_sae)  # the same in all processes, which encode together
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
    shard = _shard(sae)
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


METADATA_KEY = "active_subspace_init"


def package_version() -> str:
    return version("saelens_asi")


def write_provenance(metadata: Any, record: dict[str, Any]) -> None:
    """Store ``record`` with the package version; ValueError where it is not strict JSON (NaN, infinity)."""
    record = {**record, "saelens_asi_version": package_version()}
    metadata[METADATA_KEY] = json.loads(json.dumps(record, allow_nan=False))
