"""Error and dead features of an SAE that is not trained yet: a small model, whose coefficients are data.

Error: log NMSE = anchor + a few terms in log d_sae, log k and log tokens, each times the slope that the pilots of this
very hook have in that direction. Dead share: firing rates of features are spread log-normally around k / d_sae; a
feature is counted dead when it happens to fire on none of the tokens that are looked at. Intervals: quantiles of the
residuals on hooks that the fit has not seen (split conformal prediction).

``fitted.json`` holds the coefficients, what they were fitted on, and how well they did; ``benchmarks/plan_fit.py``
writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri

FITTED = Path(__file__).with_name("fitted.json")

_LEAST_SPREAD, _SLOPE_BEYOND = 0.05, 0.5

# Of the slope in tokens: what is steeper in the first steps does not go on.
_STEEPEST = -0.3

# Quadrature of a normal distribution.
_NODES = ndtri((np.arange(401) + 0.5) / 401)


@dataclass(frozen=True)
class Anchor:
    """What pilots and spectrum say of a hook.

    Attributes:
        d_sae: of the first pilot.
        k: of the first pilot.
        tokens: that it was trained on.
        nmse: that it reached.
        slope_k: d log NMSE / d log k between the first and the third.
        slope_tokens: d log NMSE / d log tokens within the first, from a quarter of its steps to the end.
        spread: standard deviation of the logarithm of firing rates, from the silent features of the first two pilots.
        rank_share: effective rank over width.
        gamma: length of the mean over the deviation.
        measured: False where no pilot could be run on activations, and the spectrum alone speaks.
    """

    d_sae: int
    k: int
    tokens: int
    nmse: float
    slope_k: float
    slope_tokens: float
    spread: float
    rank_share: float
    gamma: float
    measured: bool = True


@dataclass(frozen=True)
class Estimate:
    """A prediction and its 80 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fitted:
    """Coefficients and their origin, as ``fitted.json`` has them.

    Attributes:
        error: coefficients of ``error_terms``.
        error_spread: of log NMSE: half-width of the 80 % interval where nothing is extrapolated.
        spread: coefficients of ``spread_terms``.
        spread_spread: below and above: the 80 % interval of the spread.
        from_spectrum: coefficients of ``anchor_terms``, for an anchor that the spectrum alone gives.
        from_spectrum_spread: of log NMSE, its half-width.
        means: of the slopes and the spread over the hooks of the fit, where no pilot gives them.
        stock: coefficients of the dead share of plain TopK, on the logit scale, and its half-width.
        ranges: smallest and largest d_sae, k and tokens of the fit.
        provenance: results, rows, date and held-out figures.
    """

    error: Mapping[str, float]
    error_spread: float
    spread: Mapping[str, float]
    spread_spread: Sequence[float]
    from_spectrum: Mapping[str, float]
    from_spectrum_spread: float
    means: Mapping[str, float]
    stock: Mapping[str, float]
    ranges: Mapping[str, Sequence[float]]
    provenance: Mapping[str, Any]


@cache
def fitted(path: Path = FITTED) -> Fitted:
    """The coefficients that this version of the package brings."""
    return Fitted(**json.loads(path.read_text()))


def error_terms(anchor: Anchor, d_sae: float, k: float, tokens: float) -> dict[str, float]:
    """What log (NMSE / anchor) is linear in. What pilots say of d_sae is noise: hooks hardly differ in it."""
    x, y, t = math.log(d_sae / anchor.d_sae), math.log(k / anchor.k), math.log(tokens / anchor.tokens)
    return {
        "d_sae": x,
        "k x slope": y * anchor.slope_k,
        "tokens": t,
        "tokens x slope": t * max(anchor.slope_tokens, _STEEPEST),
    }


def anchor_terms(rank_share: float, tail: float, gamma: float) -> dict[str, float]:
    """What the log NMSE of the first pilot is linear in where the spectrum alone speaks.

    Args:
        rank_share: effective rank over width.
        tail: share of the variance outside the 32 leading directions.
        gamma: length of the mean over the deviation.
    """
    return {"one": 1.0, "log tail": math.log(max(tail, 1e-6)), "log rank": math.log(rank_share)}


def spread_terms(anchor: Anchor, d_sae: float, k: float, tokens: float) -> dict[str, float]:
    """What the spread of log firing rates is linear in."""
    return {
        "one": 1.0,
        "pilot": anchor.spread,
        "d_sae": math.log(d_sae / anchor.d_sae),
        "k": math.log(k / anchor.k),
        "tokens": math.log(tokens / anchor.tokens),
    }


def total(coefficients: Mapping[str, float], terms: Mapping[str, float]) -> float:
    return sum(coefficients[name] * value for name, value in terms.items() if name in coefficients)


def beyond(model: Fitted, d_sae: float, k: float, tokens: float) -> float:
    """How far outside of what was fitted, in natural logarithms, all directions together; 0 inside."""
    far = 0.0
    for name, value in (("d_sae", d_sae), ("k", k), ("tokens", tokens)):
        low, high = model.ranges[name]
        far += max(0.0, math.log(low / value), math.log(value / high))
    return far


def predict_error(anchor: Anchor, d_sae: int, k: int, tokens: float, model: Fitted | None = None) -> Estimate:
    """Normalized MSE on activations of the same text. Intervals widen with the distance from what was fitted."""
    model = model or fitted()
    seen = min(max(tokens, anchor.tokens), max(model.ranges["tokens"][1], anchor.tokens))
    # Beyond what was fitted nobody knows; power laws bend there, and half of the slope is the guess.
    terms = error_terms(anchor, d_sae, k, seen * max(1.0, tokens / seen) ** _SLOPE_BEYOND)
    middle = math.log(anchor.nmse) + total(model.error, terms)
    half = math.hypot(model.error_spread, 0.0 if anchor.measured else model.from_spectrum_spread)
    half *= 1 + beyond(model, d_sae, k, tokens)
    return Estimate(*(math.exp(value) for value in (middle, middle - half, middle + half)))


def silent_share(firings: float, spread: float) -> float:
    """Share of the features that fire on none of the tokens, where rates are log-normal.

    Args:
        firings: of a feature on these tokens, in the mean.
        spread: standard deviation of the logarithm of the rates.
    """
    rates = firings * np.exp(spread * _NODES - spread**2 / 2)
    return float(np.exp(-rates).mean())


def spread_of_silence(n_tokens: int, share: float, d_sae: int, k: int) -> float:
    """The spread of log rates with ``share`` of the features silent on ``n_tokens``; with half a feature for none."""
    share = min(max(share, 0.5 / d_sae), 0.95)
    firings = n_tokens * k / d_sae
    low, high = _LEAST_SPREAD, 6.0
    if silent_share(firings, low) >= share:
        return low
    return float(brentq(lambda spread: silent_share(firings, spread) - share, low, high))


def predict_dead(
    anchor: Anchor, d_sae: int, k: int, tokens: float, counted_on: float, model: Fitted | None = None
) -> Estimate:
    """Share of the features that fire on none of ``counted_on`` tokens of the same text."""
    model = model or fitted()
    spread = total(model.spread, spread_terms(anchor, d_sae, k, tokens))
    firings = counted_on * k / d_sae
    wider = 1 + beyond(model, d_sae, k, tokens)
    low, high = (max(_LEAST_SPREAD, spread + side * wider) for side in model.spread_spread)
    return Estimate(*(silent_share(firings, max(_LEAST_SPREAD, value)) for value in (spread, low, high)))


def tokens_to_tell(spread: float, d_sae: int, k: int, share: float = 0.01) -> float:
    """Tokens on which all but ``share`` of the living features fire once at least, with 95 % each: 3 / rate."""
    slowest = k / d_sae * math.exp(spread * float(ndtri(share)) - spread**2 / 2)
    return 3 / slowest


def predict_stock_dead(gamma: float, rank_share: float, model: Fitted | None = None) -> Estimate:
    """Share of 8,192 features of plain TopK (zeros as centre, all of d, Adam) that fire on none of 60,000 tokens."""
    model = model or fitted()
    own = model.stock
    middle = own["one"] + own["log gamma"] * math.log(gamma) + own["log rank"] * math.log(rank_share)
    return Estimate(*(1 / (1 + math.exp(-value)) for value in (middle, middle - own["half"], middle + own["half"])))
