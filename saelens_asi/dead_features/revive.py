"""Revival of dead features while an SAE trains: which ones, where to, and with what weights. Tensors alone.

The start of a run places features by Active Subspace Initialization (arXiv 2508.16929, section 3); this places those
that have died since, or never lived, by the same reasoning on what is left to explain: directions inside the active
subspace of the residual, at the norm of the lowest error. Resampling of dead features by residuals is Bricken et al.
2023, "Towards Monosemanticity", appendix; left out of it are its fixed norms, and its window after which a feature
counts as dead, which takes rare features for dead ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from saelens_asi.sparse.shards import ALONE, Group
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum

# Of all features of an SAE together: the chance that a round takes one for dead that still fires.
ERROR = 0.01

# Rates, as shares of the mean rate k / d_sae, that silence has to rule out: of a feature that has fired, which has
# learned something, and of one that never has.
_RARE, _NEVER = 0.01, 0.1

# Share of the residual's variance that its active subspace holds.
_VARIANCE_SHARE = 0.9

# A direction whose cosine with a live row, or with another that is placed, is above this is a duplicate.
MAX_COSINE = 0.9

# Norms that are tried, as multiples of the least-squares norm.
_FACTORS = tuple(2.0 ** (i / 2) for i in range(-2, 6))

# Tokens of the sample on which a feature fires at least when it is placed.
_MIN_FIRINGS = 4

# What a round changes at most: parts of all features, and of the k features that a token has.
_MAX_SHARE_OF_FEATURES, _MAX_SHARE_OF_K = 1 / 8, 1 / 16

# Rows of the decoder that are compared with directions at a time, and numbers of a matrix of features by tokens.
_ROWS, _NUMBERS = 4096, 2**22


class Silence(NamedTuple):
    """What is known of how features have fired since each was born, at the start of the run or when it was revived.

    In steps: on how many tokens of a batch a feature fires is not asked. A rate is then one of steps, at most that of
    tokens times their number, and features above the rates that count here are the safer for it.

    Attributes:
        age: steps.
        fired: steps in which it fired.
        silent: steps since it last fired, or since it was born.
    """

    age: Int64[Tensor, " n_features"]
    fired: Int64[Tensor, " n_features"]
    silent: Int64[Tensor, " n_features"]


def dead_features(silence: Silence, batch: int, mean_rate: float, d_sae: int) -> Bool[Tensor, " n_features"]:
    """Features whose silence is evidence that they are dead, and no sign of rarity.

    A feature that fires at rate p stays silent on n tokens with probability (1 - p)^n. It is dead where that is below
    ``ERROR / d_sae`` for the rate

    - of ``mean_rate / 10``, if it never fired: it knows nothing that could be lost;
    - of ``mean_rate / 100``, or of its own past where that is lower, if it has. Its past is (c + 1) firings within
      T + 100 / mean_rate tokens up to the last of them: one more firing at the rate that is asked for otherwise.

    So a feature that fires at ``mean_rate / 100`` or more is safe whatever its past, also where its rate has fallen in
    training; a rarer one waits the longer the rarer it has been.

    Args:
        silence: of the features.
        batch: tokens in a step.
        mean_rate: on which share of tokens a feature fires on average: k / d_sae.
        d_sae: features that are tested at once, in all processes.
    """
    rare = _RARE * mean_rate
    past = (silence.age - silence.silent).double() * batch
    own = (silence.fired.double() + 1) / (past + 1 / rare)
    rate = torch.where(silence.fired > 0, own.clamp(max=rare), _NEVER * mean_rate).clamp(max=1 - 1e-9)
    return silence.silent.double() * batch * torch.log1p(-rate) < math.log(ERROR / d_sae)


# A start has failed where more than such a share of all features was silent on tokens enough for so many firings each,
# and the mean of what the encoder sees is longer than ``_FAR`` deviations. A quarter: the paper's start on SmolLM2's
# attention output ends with 41 % dead if it goes on, and with 4 %, at 4 % less error, if it begins again. Nine tenths:
# a hundred firings each take a long run where features are many, and no rarity makes nearly all of them silent for ten.
# A half, between the two: the same start with 131,072 features has 67 % silent for thirty firings after a fifth of
# 800,000 tokens, and ends with 64 % dead and 10 % more error than a new start.
FAILED = ((100, 0.25), (30, 0.5), (10, 0.9))
_FAR = 0.5


def missed(silence: Silence, batch: int, mean_rate: float, firings: int) -> Bool[Tensor, " n_features"]:
    """Features silent on tokens on which one of average rate fires so many times."""
    return silence.silent.double() * batch * mean_rate >= firings


def start_has_failed(shares: Sequence[float], seen: Spectrum) -> bool:
    """Whether features start so badly that a new start is better than to revive them one by one.

    Where many features never fire and the mean is still in what the encoder sees, it is the mean that decides who
    fires: those along it do, on all tokens alike. What is placed beside them fails too, since the gradients of all
    encoder rows share the mean's direction, and the first of Adam's steps lift or drown them together.

    Args:
        shares: of all features, those that ``missed`` as many firings as each pair of ``FAILED`` says.
        seen: of activations as the encoder sees them, without the decoder's bias where it is taken off.
    """
    has_missed = any(share > most for share, (_, most) in zip(shares, FAILED, strict=True))
    return has_missed and seen.gamma > _FAR


class Sample(NamedTuple):
    """Tokens, and what an SAE makes of them at present.

    Attributes:
        x: as the encoder sees them.
        residual: what the SAE does not explain of them.
        lowest: the lowest score with which a feature is among the k of each token; 0 where fewer fire.
    """

    x: Float[Tensor, "n_tokens d_in"]
    residual: Float[Tensor, "n_tokens d_in"]
    lowest: Float[Tensor, " n_tokens"]


class Scoring(NamedTuple):
    """How an SAE ranks features.

    Attributes:
        k: features of a token.
        d_sae: of how many.
        by_norm: scores are activations times the norm of the decoder row.
        magnitude: ranked by absolute value.
    """

    k: float
    d_sae: int
    by_norm: bool
    magnitude: bool

    def n_firings(self, n_tokens: int) -> int:
        """On how many tokens of a sample a feature fires on average; enough of them to place it."""
        return min(n_tokens, max(_MIN_FIRINGS, round(n_tokens * self.k / self.d_sae)))

    def most_at_once(self, n_tokens: int) -> int:
        """How many features a round places at most, so that the error does not jump: a part of all features, and of
        those that fire on a token."""
        of_k = _MAX_SHARE_OF_K * self.k * n_tokens / self.n_firings(n_tokens)
        return max(1, math.floor(min(_MAX_SHARE_OF_FEATURES * self.d_sae, of_k)))


class Revived(NamedTuple):
    """Weights of features; encoder and decoder rows are ``norm`` times one direction.

    Attributes:
        directions: unit rows.
        norm: of each.
        bias: of the encoder.
    """

    directions: Float[Tensor, "n d_in"]
    norm: Float[Tensor, " n"]
    bias: Float[Tensor, " n"]


def forgetting(before: RunningMoments | None, residual: Float[Tensor, "n_tokens d_in"]) -> RunningMoments:
    """Moments of residuals of this round and those before it, each of which counts half as much as the one after."""
    here = RunningMoments.zeros(residual.shape[1], residual.device).update_(residual)
    if before is None:
        return here
    return here.merge_(RunningMoments(before.n_tokens // 2, before.mean, before.scatter / 2))


def residual_directions(
    sample: Sample, moments: RunningMoments, n: int, generator: torch.Generator
) -> Float[Tensor, "m d_in"]:
    """Unit directions of residuals inside their active subspace, at most n, drawn by squared length without repetition.

    Centred: what all tokens lack is for the decoder's bias to learn.

    Args:
        sample: of tokens.
        moments: of residuals.
        n: how many are asked for.
        generator: of the CPU.
    """
    spectrum = Spectrum.from_moments(moments)
    if not spectrum.total_variance > 0:
        return sample.residual[:0]
    basis = spectrum.principal_directions(spectrum.intrinsic_dimension(_VARIANCE_SHARE)).to(sample.residual)
    inside = (sample.residual - moments.mean.to(sample.residual)) @ basis
    squares = inside.square().sum(dim=1).double().cpu()
    # The n largest of log w + Gumbel noise: a draw without repetition by weights w (Efraimidis and Spirakis 2006).
    noise = -torch.rand(len(squares), generator=generator, dtype=torch.float64).log().neg().log()
    keys = squares.log() + noise
    drawn = keys.topk(min(n, int((squares > 0).sum()))).indices.to(inside.device)
    return torch.nn.functional.normalize(inside[drawn] @ basis.T, dim=1)


def largest_cosines(
    directions: Float[Tensor, "n d_in"],
    W_dec: Float[Tensor, "n_features d_in"],
    live: Bool[Tensor, " n_features"],
    magnitude: bool = False,
    group: Group = ALONE,
) -> Float[Tensor, " n"]:
    """Of each direction the largest cosine with a live decoder row, of all processes of ``group``.

    Args:
        directions: unit rows.
        W_dec: of the features that lie here.
        live: which of them are.
        magnitude: the largest absolute value: a feature of an AbsTopK stands for both signs.
        group: of the processes that hold the other features.
    """
    largest = directions.new_full((len(directions),), -1.0)
    for start in range(0, len(W_dec), _ROWS):
        rows = W_dec[start : start + _ROWS].to(directions.dtype)
        cosines = directions @ torch.nn.functional.normalize(rows, dim=1).T
        cosines = cosines.abs_() if magnitude else cosines
        cosines.masked_fill_(~live[start : start + _ROWS], -1.0)
        torch.maximum(largest, cosines.amax(dim=1), out=largest)
    return group.max_(largest)


def apart(
    directions: Float[Tensor, "n d_in"], taken: Bool[Tensor, " n"], magnitude: bool = False
) -> Int64[Tensor, " m"]:
    """Which directions to keep so that no two are duplicates: the first of any two, without those that are taken.

    Costs n^2 d_in: n is the number of tokens in a sample at most.
    """
    cosines = (directions @ directions.T).cpu()
    near = (cosines.abs_() if magnitude else cosines) > MAX_COSINE
    blocked, kept = taken.cpu().clone(), []
    for i, is_blocked in enumerate(blocked):  # a view: what is blocked on the way shows
        if not is_blocked:
            kept.append(i)
            blocked |= near[i]
    return torch.tensor(kept, dtype=torch.int64, device=directions.device)


def placed(directions: Float[Tensor, "n d_in"], sample: Sample, scoring: Scoring) -> tuple[Revived, Tensor]:
    """Norm and bias with which features enter among the best k of a few tokens, at the lowest error on these.

    Of direction v, norm c and bias b a feature has the activation a = c v.x + b and adds a c v to the reconstruction.
    b is such that on ``Scoring.n_firings`` tokens of the sample its score reaches the lowest of the k. c is the one
    with the lowest error on these tokens among some around the closed form, c^2 = <v.x, v.e> / <v.x, v.x> over the
    tokens with the largest v.x, as the norm at the start of a run is that of the lowest error.

    An AbsTopK would fire on the other side of a bias too: there b is 0, and c alone lets it enter.

    Returns:
        The features, and by how much each lowers the squared error of the sample; (n,).
    """
    parts = [
        _placed(part, sample, scoring)
        for part in torch.split(directions, max(1, _NUMBERS // max(1, len(sample.x))))
        if len(part)
    ]
    if not parts:
        nothing = directions.new_zeros(0)
        return Revived(directions, nothing, nothing), nothing
    norm, bias, gain = (torch.cat([part[i] for part in parts]) for i in range(3))
    return Revived(directions, norm, bias), gain


def _placed(
    directions: Float[Tensor, "n d_in"], sample: Sample, scoring: Scoring
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Norm, bias and gain of each."""
    along, wanted = directions @ sample.x.T, directions @ sample.residual.T
    n_firings = scoring.n_firings(len(sample.x))
    best = norm = along.new_full((len(directions),), -torch.inf)
    bias = torch.zeros_like(norm)
    for tried in _norms(along, wanted, sample.lowest, n_firings, scoring):
        c = tried[:, None]
        per_activation = c if scoring.by_norm else torch.ones_like(c)
        margin = c * (along.abs() if scoring.magnitude else along) - sample.lowest / per_activation
        margins, tokens = margin.topk(n_firings, dim=1)
        b = torch.zeros_like(c) if scoring.magnitude else -margins[:, -1:]
        added = (c * along.gather(1, tokens) + b) * c
        gain = (2 * added * wanted.gather(1, tokens) - added.square()).sum(dim=1)
        better = gain > best
        norm, bias = torch.where(better, tried, norm), torch.where(better, b.squeeze(1), bias)
        best = torch.where(better, gain, best)
    return norm, bias, best


def _norms(
    along: Float[Tensor, "n n_tokens"],
    wanted: Float[Tensor, "n n_tokens"],
    lowest: Float[Tensor, " n_tokens"],
    n_firings: int,
    scoring: Scoring,
) -> list[Float[Tensor, " n"]]:
    tiny = torch.finfo(along.dtype).tiny
    if scoring.magnitude:
        ratio = (lowest / along.abs().clamp(min=tiny)).kthvalue(n_firings, dim=1).values
        return [ratio.sqrt() if scoring.by_norm else ratio]
    most, tokens = along.topk(n_firings, dim=1)
    square = (most * wanted.gather(1, tokens)).sum(dim=1) / most.square().sum(dim=1).clamp(min=tiny)
    # Where the largest v.x are of tokens that are explained already, the closed form is nothing, or less.
    least_squares = square.clamp(min=0.01).sqrt()
    return [factor * least_squares for factor in _FACTORS]
