"""An SAE as a set of features: which live, how alike they are, what is new beside another's, what a part carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from benchmarks.claims.features import density, largest_cosines, redundancy, restricted, silent, unmatched
from saelens_asi import evaluate
from saelens_asi.activations.hooks import HookedModel

# Cosines of decoder rows from which on a feature has a counterpart.
COUNTERPART = (0.5, 0.7)
# Median cosine of features of one number from which on two SAEs started from the same directions.
SAME_START = 0.5
Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Dictionary:
    """An SAE, and what it does on held-out activations.

    Attributes:
        sae: in its form for inference.
        counts: (d_sae,) on how many of the activations each feature fires.
        measures: over these activations.
    """

    sae: SAE
    counts: Tensor
    measures: Record

    @classmethod
    def load(cls, folder: Path, held_out: Tensor) -> Dictionary:
        sae = SAE.load_from_disk(folder)
        found = evaluate(sae, activations=held_out, ranks=False, progress=False)
        names = ("n_tokens", "d_sae", "dead_fraction", "nmse", "l0")
        return cls(sae, found.firing_counts, {name: getattr(found, name) for name in names})

    @property
    def live(self) -> Tensor:
        """(n,) features that fire on at least one held-out activation."""
        return self.counts.nonzero().squeeze(1)

    def rows(self) -> Tensor:
        """(n, d) decoder directions of the live features."""
        weights: Tensor = self.sae.W_dec.detach()
        return weights[self.live]


def shape(dictionary: Dictionary, among: int, sampled: int) -> Record:
    """Redundancy of ``sampled`` live features, beside all others and beside ``among`` of them; density of firings."""
    rows, n = dictionary.rows(), int(dictionary.measures["n_tokens"])
    return {
        **dictionary.measures,
        "live": len(rows),
        "redundancy": redundancy(rows, sampled),
        "redundancy_at_equal_number": redundancy(rows, sampled, among=among),
        "density": density(dictionary.counts, n),
    }


def added_features(dictionary: Dictionary, baseline: Dictionary) -> tuple[str, Tensor]:
    """How those that the baseline lacks were told, by number or by match, and their numbers (n,)."""
    live, other = dictionary.live, baseline.live
    both = live[torch.isin(live, other)]
    one, two = dictionary.sae.W_dec.detach(), baseline.sae.W_dec.detach()
    if one.shape == two.shape and len(both):
        cosines = torch.cosine_similarity(one[both], two[both], dim=1)
        if float(cosines.median()) >= SAME_START:
            return "number", live[~torch.isin(live, other)]
    return "match", live[unmatched(dictionary.rows(), baseline.rows())]


def novelty(dictionary: Dictionary, baseline: Dictionary) -> tuple[Record, Tensor]:
    """How many features are added, their share of all firings, how many have no counterpart; and the added (n,)."""
    told_by, added = added_features(dictionary, baseline)
    firings = dictionary.counts.double()
    record: Record = {
        "told_by": told_by,
        "added": len(added),
        "share_of_live": len(added) / max(1, len(dictionary.live)),
        "share_of_firings": float(firings[added].sum() / firings.sum()),
    }
    nearest = largest_cosines(dictionary.rows(), baseline.rows())
    nearest_here = largest_cosines(baseline.rows(), dictionary.rows())
    for threshold in COUNTERPART:
        record[f"without_counterpart_{threshold:g}"] = float((nearest < threshold).double().mean())
        record[f"baseline_without_counterpart_{threshold:g}"] = float((nearest_here < threshold).double().mean())
    return record, added


def parts(dictionary: Dictionary, added: Tensor, draws: int) -> dict[str, SAE]:
    """The SAE with all features, with none, with those added, with the other live ones, and with as many at random."""
    live = dictionary.live
    chosen = {"added": added, "others": live[~torch.isin(live, added)]}
    made: dict[str, Tensor] = {name: features for name, features in chosen.items() if len(features)}
    for name, features in list(made.items()):
        for draw in range(draws):
            order = torch.randperm(len(live), generator=torch.Generator().manual_seed(draw))
            made[f"as many as {name}, at random #{draw}"] = live[order[: len(features)]].sort().values
    sae = dictionary.sae
    return {"all": sae, "none": silent(sae), **{name: restricted(sae, features) for name, features in made.items()}}


def carried(
    made: Mapping[str, SAE],
    model: HookedModel,
    text: Any,
    *,
    hook_name: str,
    n_tokens: int,
    loss_tokens: int,
    context_size: int,
) -> Record:
    """Error and predictions with each part in place; of the random ones the mean. ``features`` is how many there are.

    ``none`` is what the decoder's bias recovers by itself: a part carries what it recovers beyond that.

    Args:
        made: of ``parts``.
        model: a TransformerBridge.
        text: documents that no SAE was trained on.
        hook_name: where the parts stand in.
        n_tokens: on which they reconstruct.
        loss_tokens: of these, those on which predictions are compared.
        context_size: tokens in a window.
    """
    found = evaluate(
        made, model, text, hook_name=hook_name, n_tokens=n_tokens, loss_tokens=loss_tokens,
        ranks=False, context_size=context_size, progress=False,
    )  # fmt: skip
    values: dict[str, list[Record]] = {}
    for name, one in found.items():
        loss = one.loss.to_dict() if one.loss else {}
        own = {"features": 0 if name == "none" else made[name].cfg.d_sae, "nmse": one.nmse, "l0": one.l0}
        own |= {key: loss[key] for key in ("recovered", "kl_recovered") if key in loss}
        values.setdefault(name.split(" #")[0], []).append(own)
    return {name: {key: _mean([one[key] for one in of]) for key in of[0]} for name, of in values.items()}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
