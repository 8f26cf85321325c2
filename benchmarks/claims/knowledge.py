"""What features know: sparse probes on them, on raw activations, and on random directions, over tasks and splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.claims import probes
from benchmarks.claims.probes import SPARSITIES, Examples, Score, Split

Record = dict[str, Any]
Encode = Callable[[Tensor], Tensor]
# Scores of probes by task, by what was probed, one for each split.
Scores = dict[str, dict[str, list[Score]]]
Probe = Callable[[csr_array, np.ndarray, np.ndarray, Split, int], dict[str, Score]]


@torch.no_grad()
def encoded(encode: Encode, activations: Tensor, size: int) -> csr_array:
    """(n, d_sae) feature activations, those that are not zero, ``size`` rows at a time."""
    parts = [csr_array(encode(x.float()).numpy()) for x in torch.split(activations, size)]
    return csr_array(vstack(parts, format="csr"))


def random_dictionary(mean: Tensor, d_sae: int, k: int) -> Encode:
    """A control that nobody trained: random directions about a mean (d,), the k largest of which are active."""
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(d_sae, len(mean), generator=generator), dim=1)

    def encode(x: Tensor) -> Tensor:
        values, indices = ((x - mean) @ directions.T).topk(k, dim=1)
        return torch.zeros(len(x), d_sae).scatter_(1, indices, values.relu())

    return encode


def probe_all(
    activations: csr_array, told_apart: Mapping[str, Examples], probe: Probe, n_splits: int, most: tuple[int, int]
) -> Scores:
    """What a probe scores on each task, for each split of the documents, which are the same for all activations.

    Args:
        activations: (n_tokens, p) of all text.
        told_apart: examples made of them, by kind.
        probe: what to fit.
        n_splits: of the documents.
        most: examples of a class to fit on, and to test on.
    """
    scores: Scores = {}
    for kind, examples in told_apart.items():
        x = examples.of(activations)
        for task, labels in examples.labels.items():
            name = task if task == kind or len(examples.labels) == 1 else f"{kind}: {task}"
            for seed in range(n_splits):
                rows = probes.split(labels, examples.documents, most, seed)
                for what, score in probe(x, labels, examples.documents, rows, seed).items():
                    scores.setdefault(name, {}).setdefault(what, []).append(score)
    return scores


def probe_features(candidates: Mapping[str, np.ndarray]) -> Probe:
    """Sparse probes on the best of some features, for each set of them that holds enough, and on random ones."""

    def probe(x: csr_array, y: np.ndarray, documents: np.ndarray, rows: Split, seed: int) -> dict[str, Score]:
        found = {}
        for k in SPARSITIES:
            for name, features in candidates.items():
                if len(features) >= k:
                    found[f"{name}, k={k}"], _ = probes.sparse_probe(x, y, rows, k, features)
            found[f"at random, k={k}"] = probes.random_probe(x, y, rows, k, seed)
        return found

    return probe


def probe_raw(x: csr_array, y: np.ndarray, documents: np.ndarray, rows: Split, seed: int) -> dict[str, Score]:
    """The best dimensions of raw activations, and all of them."""
    own = np.arange(x.shape[1])
    found = {f"best, k={k}": probes.sparse_probe(x, y, rows, k, own)[0] for k in SPARSITIES}
    return {**found, "dense": probes.dense_probe(x, y, documents, rows, seed)}


def summary(scores: Scores, against: Scores | None = None) -> Record:
    """Mean and interval of accuracy and AUC by task and over all tasks; beside them AUC less that of ``against``."""
    whole = {**scores, "all tasks": _over_tasks(scores)}
    other = {} if against is None else {**against, "all tasks": _over_tasks(against)}
    return {task: {what: _summed_up(own, other.get(task, {}).get(what)) for what, own in of.items()}
            for task, of in whole.items()}  # fmt: skip


def _over_tasks(scores: Scores) -> dict[str, list[Score]]:
    """Of each split the mean over tasks, for what was probed in all of them."""
    shared = set.intersection(*(set(of) for of in scores.values()))
    return {
        what: [Score(*np.mean(one, axis=0).tolist()) for one in zip(*(of[what] for of in scores.values()), strict=True)]
        for what in next(iter(scores.values()))
        if what in shared
    }


def _summed_up(scores: list[Score], against: list[Score] | None) -> Record:
    names = Score._fields
    found: Record = {name: probes.interval([getattr(one, name) for one in scores]) for name in names}
    if against:
        pairs = zip(scores, against, strict=True)
        found["auc_less_baseline"] = probes.interval([one.auc - other.auc for one, other in pairs])
    return found
