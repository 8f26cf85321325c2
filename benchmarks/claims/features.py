"""Features of one dictionary: how alike they are, how often they fire, which another one lacks, what a part carries."""

from __future__ import annotations

import math

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import normalize

# Cosines held at a time.
_BLOCK = 2**25
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_ALIKE = 0.9


def largest_cosines(rows: Tensor, others: Tensor, own: Tensor | None = None) -> Tensor:
    """(n,) the largest cosine of each of ``rows`` (n, d) to one of ``others`` (m, d).

    Costs 2 n m d operations, and memory for 2^25 cosines at a time. Where there are no others it is minus infinity.

    Args:
        rows: of any length.
        others: of any length.
        own: (n,) where in ``others`` a row itself is, which is no other.
    """
    if not len(others):
        return torch.full((len(rows),), -math.inf)
    others, found = normalize(others, dim=1), []
    size = max(1, _BLOCK // len(others))
    for start in range(0, len(rows), size):
        cosines = normalize(rows[start : start + size], dim=1) @ others.T
        if own is not None:
            cosines.scatter_(1, own[start : start + size, None], -math.inf)
        found.append(cosines.amax(dim=1))
    return torch.cat(found) if found else rows.new_zeros(0)


def nearest_others(rows: Tensor) -> Tensor:
    """(n,) the largest cosine of each of ``rows`` (n, d) to another of them, minus infinity where there is none.

    As ``largest_cosines``, for half of its cost: each pair is multiplied once.
    """
    rows = normalize(rows, dim=1)
    largest = rows.new_full((len(rows),), -math.inf)
    size = max(1, _BLOCK // max(1, len(rows)))
    for start in range(0, len(rows), size):
        cosines = rows[start : start + size] @ rows[start:].T
        cosines.fill_diagonal_(-math.inf)
        left = largest[start:]
        left.copy_(torch.maximum(left, cosines.amax(dim=0)))
        left[: len(cosines)] = torch.maximum(left[: len(cosines)], cosines.amax(dim=1))
    return largest


def unmatched(rows: Tensor, others: Tensor) -> Tensor:
    """(n,) bool, which of ``rows`` (n, d) are left when each of ``others`` (m, d) has taken one: n - m, or none.

    The pair with the largest cosine of all is taken first, then that of the largest among what is left, and so on.
    Takes a few times as long as ``largest_cosines``: all pairs that are the best of both their sides go at once.
    """
    rows, others = normalize(rows, dim=1), normalize(others, dim=1)
    left, waiting = torch.arange(len(rows)), torch.arange(len(others))
    while len(left) and len(waiting):
        wanted, by = _best_of_both(others[waiting], rows[left])
        mutual = by[wanted] == torch.arange(len(waiting))
        taken = torch.zeros(len(left), dtype=torch.bool).index_fill(0, wanted[mutual], True)
        left, waiting = left[~taken], waiting[~mutual]
    return torch.zeros(len(rows), dtype=torch.bool).index_fill(0, left, True)


def _best_of_both(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Of unit rows: (n,) where in ``others`` the nearest to each of ``rows`` is, and (m,) the other way round.

    Of equally near ones the first.
    """
    size = max(1, _BLOCK // len(others))
    nearest = []
    best, best_at = rows.new_full((len(others),), -math.inf), torch.zeros(len(others), dtype=torch.long)
    for start in range(0, len(rows), size):
        cosines = rows[start : start + size] @ others.T
        nearest.append(cosines.argmax(dim=1))
        values, at = cosines.max(dim=0)
        best_at = torch.where(values > best, at + start, best_at)
        best = torch.maximum(best, values)
    return torch.cat(nearest), best_at


def redundancy(rows: Tensor, sample: int, among: int | None = None, seed: int = 0) -> dict[str, float]:
    """Largest cosines to another feature: quantiles and the share above 0.9, of a sample of features.

    The more features there are, the nearer the nearest one lies, so that dictionaries are compared at one number.

    Args:
        rows: (n, d) decoder directions.
        sample: how many features are looked at.
        among: how many features there are, drawn from all; all unless told.
        seed: of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)[:among]]
    own = torch.arange(min(sample, len(rows)))
    if len(rows) < 2:
        return {"features": len(rows), "sampled": 0}
    cosines = largest_cosines(rows[own], rows, own).double()
    quantiles = {f"quantile_{q:g}": float(cosines.quantile(q)) for q in (0.5, 0.9, 0.99)}
    above = {f"above_{_ALIKE:g}": float((cosines > _ALIKE).double().mean())}
    return {"features": len(rows), "sampled": len(own), **quantiles, **above}


def density(firing_counts: Tensor, n_tokens: int) -> dict[str, float]:
    """How firings (d_sae,) on ``n_tokens`` tokens are spread over the features that fire at all.

    Quantiles of log10 of the rates, and the effective number of features: exp of the entropy, in nats, of each
    feature's share of all firings. It is the number of live features where all fire equally often.
    """
    counts = firing_counts[firing_counts > 0].double()
    shares = counts / counts.sum()
    logs = (counts / n_tokens).log10()
    quantiles = {f"log10_rate_{q:g}": float(logs.quantile(q)) for q in _QUANTILES} if len(logs) else {}
    return {**quantiles, "effective_features": float((-(shares * shares.log()).sum()).exp()) if len(logs) else 0.0}


# Weights that hold one entry a feature, and along which dimension.
_OF_FEATURES = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0}


@torch.no_grad()
def restricted(sae: SAE, features: Tensor) -> SAE:
    """The SAE with some of its features (n,), in this order: a token's active ones are chosen among these alone.

    With TopK it is the same as hiding all other pre-activations before the choice, so that k features, or all there
    are, stay active. With a threshold, fewer do.

    Raises:
        ValueError: for no features, or an SAE whose weights are others than an encoder, a decoder and thresholds.
    """
    state = sae.state_dict()
    unknown = state.keys() - _OF_FEATURES.keys() - {"b_dec"}
    if unknown:
        raise ValueError(f"{sae.cfg.architecture()} SAEs cannot be restricted: they have {sorted(unknown)}")
    if not len(features):
        raise ValueError("an SAE needs at least one feature: see silent() for none")
    values = {**sae.cfg.to_dict(), "d_sae": len(features)}
    if "k" in values:
        values["k"] = min(values["k"], len(features))
    part = SAE.from_dict(values)
    part.load_state_dict(
        {n: w.index_select(_OF_FEATURES[n], features) if n in _OF_FEATURES else w for n, w in state.items()}
    )
    return part


@torch.no_grad()
def silent(sae: SAE) -> SAE:
    """The SAE without features: what its decoder's bias does alone."""
    part = restricted(sae, torch.zeros(1, dtype=torch.long))
    part.W_enc.zero_()
    part.b_enc.zero_()
    return part
