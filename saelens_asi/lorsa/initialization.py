"""Where a Lorsa's features start: random, in the active subspace of attn_out, or tied through each original head."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saelens_asi.initialization import ActiveSubspaceInit, choose_d_init, random_directions_, subspace_basis
from saelens_asi.lorsa.attention import AttentionTarget
from saelens_asi.lorsa.config import from_dict
from saelens_asi.lorsa.model import Lorsa
from saelens_asi.lorsa.sequences import finite_sequences
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

logger = logging.getLogger(__name__)

METHODS = ("random", "active", "per_head")
_NAMED_NORMS = ("least_squares", "matched")

# Positions that the norm is fitted on.
NORM_SAMPLE = 2048


@dataclass(frozen=True, kw_only=True)
class LorsaInit:
    """Settings of a Lorsa's initialization. Frozen and inert.

    The defaults are those that measured best on a real model (benchmarks/results/lorsa.md).

    Attributes:
        method: ``"random"``: W_O and W_V in random directions. ``"active"``: W_O in random directions of the active
            subspace of attn_out, W_V random (arXiv 2508.16929, section on Lorsa). ``"per_head"``: the features of
            original head h start with W_O in the active subspace of that head's own output o_h, and W_V tied to it
            through W_V^h W_O^h, so that a pre-activation is the projection of o_h on the feature's direction.
        d_init: dimension of the subspace, as in ``ActiveSubspaceInit``; ``"auto"`` with ``"per_head"`` is all that the
            head writes to.
        norm: ``"least_squares"``: scale with the lowest initial error in closed form (tied methods: ``"per_head"``);
            ``"matched"``: the output starts with the energy of attn_out; or a number: the geometric mean of the
            norms of rows of W_V and W_O.
        center: ``"mean"``: b_D at the mean of attn_out, and what each head reads is taken relative to its mean, so that
            pre-activations have mean zero; or ``"zeros"``.
        n_tokens: positions read for the estimate, or ``"auto"``: 32 for each dimension of d_model. They are streamed.
        balance: of ``"per_head"``: a feature's row of W_V is divided by the standard deviation of its pre-activation
            to this power, and its row of W_O multiplied by it. At 0 features of weak heads and weak directions are
            rarely among the top k; at 1 all pre-activations have one variance, and all features start alive.
        value_share: rows of W_V are this many times as long as rows of W_O, at the same output. Adam moves both by the
            same amounts, so the higher, the less pre-activations move in training, compared with what is written.
        seed: of the directions, which have a generator of their own.
    """

    method: Literal["random", "active", "per_head"] = "per_head"
    d_init: int | float | Literal["auto"] = "auto"
    norm: float | Literal["least_squares", "matched"] = "least_squares"
    center: Literal["mean", "zeros"] = "mean"
    n_tokens: int | Literal["auto"] = "auto"
    balance: float = 0.5
    value_share: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} must be one of {METHODS}")
        if isinstance(self.norm, str):
            if self.norm not in _NAMED_NORMS:
                raise ValueError(f"norm={self.norm!r} must be a positive number, or one of {_NAMED_NORMS}")
            if self.norm == "least_squares" and self.method != "per_head":
                raise ValueError(
                    f"norm='least_squares' needs an encoder tied to the decoder, which method={self.method!r} does not "
                    "have: give norm='matched' or a number, or method='per_head'"
                )
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance={self.balance} must lie in [0, 1]")
        if not 0 < self.value_share < math.inf:
            raise ValueError(f"value_share={self.value_share} must be a positive number")
        self.subspace()  # checks the settings that both have

    def subspace(self) -> ActiveSubspaceInit:
        """The settings of the subspace alone."""
        return ActiveSubspaceInit(
            d_init=self.d_init,
            n_tokens=self.n_tokens,
            norm=1.0 if isinstance(self.norm, str) else self.norm,
            center=self.center,
            subspace="full" if self.method == "random" else "active",
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LorsaInit:
        """Inverse of ``to_dict``. Raises ValueError for a setting that does not exist."""
        return from_dict(cls, values)


@dataclass(frozen=True)
class LorsaInitialization:
    """What an initialization did.

    Attributes:
        d_init: dimension of the subspace; for ``"per_head"`` one for each original head.
        n_tokens: positions that were read.
        norm: geometric mean of the rows' norms (root mean square) of W_V and of W_O.
        initial_nmse: E|y - y_hat|^2 / E|y - E y|^2 on the sample.
        n_skipped_tokens: positions of sequences that were left out because they hold a number that is not finite.
    """

    d_init: list[int]
    n_tokens: int
    norm: float
    initial_nmse: float
    n_skipped_tokens: int = 0


@dataclass(frozen=True)
class _Estimate:
    """What was streamed: moments of attn_out, of each head's z (before W_O), and the mean of pattern @ input."""

    output: RunningMoments
    heads: list[RunningMoments]
    mean_read: Tensor  # (n_heads, d_model) float64
    sample: list[tuple[Tensor, Tensor]]
    n_skipped: int


@torch.no_grad()
def initialize_lorsa_(
    lorsa: Lorsa, target: AttentionTarget, batches: Iterable[tuple[Tensor, Tensor]], settings: LorsaInit
) -> LorsaInitialization:
    """Initialize W_V, W_O, b_V and b_D of a fresh Lorsa made from ``target``, in place.

    Sequences with a number that is not finite are left out and counted.

    Args:
        lorsa: its queries and keys must be those of the target, as ``Lorsa.from_attention`` makes them.
        target: of ``read_attention``.
        batches: (x, y) pairs of what the layer reads and puts out; read until there are enough tokens.
        settings: what to do.

    Raises:
        ValueError: for a Lorsa that was trained, too few tokens, or settings that do not fit.
    """
    if bool(lorsa.b_D.any()):
        raise ValueError(
            "an initialization would overwrite this Lorsa's weights, which are not fresh (b_D is not zero): make a new "
            "one with Lorsa.from_attention"
        )
    if lorsa.cfg.n_ov_heads % target.n_heads:
        raise ValueError(f"n_ov_heads={lorsa.cfg.n_ov_heads} must be divisible by the layer's {target.n_heads} heads")
    estimate = _estimate(lorsa, target, batches, settings)
    spectrum = Spectrum.from_moments(estimate.output)
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.method == "per_head":
        d_init = _tie_through_heads_(lorsa, target, estimate, settings, generator)
    else:
        d_init = [_random_features_(lorsa, spectrum, settings, generator)]
    if settings.center == "mean":
        lorsa.mean_read.copy_(estimate.mean_read.repeat_interleave(lorsa.cfg.n_qk_heads // target.n_heads, dim=0))
        lorsa.b_V.zero_()
        lorsa.b_D.copy_(estimate.output.mean)
    norm = _scale_(lorsa, estimate.sample, settings.norm, settings.value_share)
    done = LorsaInitialization(
        d_init=d_init,
        n_tokens=estimate.output.n_tokens,
        norm=norm,
        initial_nmse=_error(lorsa, estimate.sample) / spectrum.total_variance,
        n_skipped_tokens=estimate.n_skipped,
    )
    lorsa.provenance["initialization"] = {"settings": settings.to_dict(), **asdict(done)}
    return done


def _estimate(
    lorsa: Lorsa, target: AttentionTarget, batches: Iterable[tuple[Tensor, Tensor]], settings: LorsaInit
) -> _Estimate:
    exact = Lorsa.exact(target)
    n_tokens, skip = settings.subspace().tokens_for(target.d_model), lorsa.cfg.skip_positions
    output = RunningMoments.zeros(target.d_model, lorsa.W_V.device)
    heads = [RunningMoments.zeros(target.d_head, lorsa.W_V.device) for _ in range(target.n_heads)]
    read = torch.zeros(target.n_heads, target.d_model, dtype=torch.float64, device=output.mean.device)
    sample: list[tuple[Tensor, Tensor]] = []
    n_skipped = 0
    for x, y in batches:
        x, y = x.to(lorsa.W_V), y.to(lorsa.W_V)
        good = finite_sequences(x, y, skip)
        if not good.all():
            if not n_skipped:
                logger.warning("sequences with activations that are not finite are left out of the initialization")
            n_skipped += int((~good).sum()) * x.shape[1]
            x, y = x[good], y[good]
            if not len(x):
                continue
        output.update_(y[:, skip:])
        pattern = exact.scores(x.shape[1], x.shape[1]).pattern(*exact.queries_and_keys(x))[:, :, skip:]
        if settings.method == "per_head":
            z = pattern @ exact.values(x)
            for head, moments in enumerate(heads):
                moments.update_(z[:, head])
        mean_pattern = pattern.sum(dim=2)  # (batch, heads, n_keys): how often each position is read
        read += torch.einsum("bhk,bkd->hd", mean_pattern, x).to(read)
        if sum(len(pair[0]) * pair[0].shape[1] for pair in sample) < NORM_SAMPLE:
            sample.append((x, y))
        if output.n_tokens >= n_tokens:
            break
    if output.n_tokens < max(2, n_tokens if settings.n_tokens != "auto" else 2):
        raise ValueError(f"n_tokens={settings.n_tokens}, but the batches hold only {output.n_tokens}: give more data")
    return _Estimate(output, heads, read / output.n_tokens, sample, n_skipped)


def _random_features_(lorsa: Lorsa, spectrum: Spectrum, settings: LorsaInit, generator: torch.Generator) -> int:
    basis = subspace_basis(settings.subspace(), spectrum, generator)
    random_directions_(lorsa.W_O, basis, generator)
    random_directions_(lorsa.W_V, None, generator)
    return spectrum.d if basis is None else basis.shape[1]


def _tie_through_heads_(
    lorsa: Lorsa, target: AttentionTarget, estimate: _Estimate, settings: LorsaInit, generator: torch.Generator
) -> list[int]:
    """Features of each head: directions in the active subspace of its output o_h = z_h W_O^h, read back through it."""
    n_features = lorsa.cfg.n_ov_heads // target.n_heads
    dims = []
    for head, moments in enumerate(estimate.heads):
        W_O = target.W_O[head].to(moments.mean)
        own = Spectrum(moments.mean @ W_O, W_O.T @ moments.covariance() @ W_O, moments.n_tokens)
        all_of_it = min(target.d_head, own.rank)
        d_init = all_of_it if settings.d_init == "auto" else choose_d_init(settings.subspace(), own)
        rows = slice(head * n_features, (head + 1) * n_features)
        random_directions_(lorsa.W_O[rows], own.principal_directions(d_init), generator)
        through = target.W_O[head] @ lorsa.W_O[rows].T.to(target.W_O)  # (d_head, n_features)
        lorsa.W_V[rows].copy_((target.W_V[head] @ through).T)
        lorsa.b_V[rows].copy_(target.b_V[head] @ through)
        dims.append(d_init)
        directions = lorsa.W_O[rows].to(own.covariance)
        deviation = ((directions @ own.covariance) * directions).sum(dim=1).sqrt()
        factor = deviation.clamp_min(1e-6 * deviation.max()).pow(settings.balance).to(lorsa.W_V)
        lorsa.W_V[rows] /= factor[:, None]
        lorsa.b_V[rows] /= factor
        lorsa.W_O[rows] *= factor[:, None]
    return dims


def _scale_(lorsa: Lorsa, sample: list[tuple[Tensor, Tensor]], norm: float | str, value_share: float) -> float:
    """Scale the output to ``norm``, shared between W_V and W_O; returns the geometric mean of their norms."""
    scale = norm**2 if not isinstance(norm, str) else 1.0
    if isinstance(norm, str):
        dot, square, energy = 0.0, 0.0, 0.0
        for x, y in sample:
            skip = lorsa.cfg.skip_positions
            y_hat, target = (lorsa(x) - lorsa.b_D)[:, skip:].double(), (y - lorsa.b_D)[:, skip:].double()
            dot, square = dot + float((y_hat * target).sum()), square + float(y_hat.square().sum())
            energy += float(target.square().sum())
        if square == 0 or (norm == "least_squares" and dot <= 0):
            raise ValueError(f"norm={norm!r} found no output to scale on the sample: give norm a number")
        scale = dot / square if norm == "least_squares" else (energy / square) ** 0.5
    rms = [float(weight.double().square().sum(dim=1).mean().sqrt()) for weight in (lorsa.W_V, lorsa.W_O)]
    each = (scale * rms[0] * rms[1]) ** 0.5
    lorsa.W_V.mul_(each * value_share**0.5 / rms[0])
    lorsa.b_V.mul_(each * value_share**0.5 / rms[0])
    lorsa.W_O.mul_(each / value_share**0.5 / rms[1])
    return each


def _error(lorsa: Lorsa, sample: list[tuple[Tensor, Tensor]]) -> float:
    skip = lorsa.cfg.skip_positions
    squares = [(lorsa(x) - y)[:, skip:].double().square().sum(dim=-1).flatten() for x, y in sample]
    return float(torch.cat(squares).mean())
