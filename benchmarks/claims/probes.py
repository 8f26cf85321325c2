"""Sparse probes: how well few features tell two classes apart, on documents that the probe has not seen.

As in Gurnee et al. (arXiv 2305.01610, sec. 3) and SAEBench (arXiv 2503.09532): the k features whose means differ most
between the classes, then a logistic regression on them. Means are compared in units of each feature's standard
deviation, since raw dimensions, which are probed beside features, differ in scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit
from scipy.stats import rankdata, t

SPARSITIES = (1, 5, 20)
# Penalties that a probe on all dimensions chooses from, on a part of its training documents.
_PENALTIES = (1.0, 10.0, 100.0, 1000.0)
_TEST_SHARE = 0.3


@dataclass(frozen=True, eq=False)
class Examples:
    """What is to be told apart.

    Attributes:
        first_row: of the activations that they are made of, among those of all text.
        pooling: (n, n_tokens) rows that sum to 1: an example is the mean of some tokens' activations.
        documents: (n,) number of the document that each comes from.
        labels: by task, (n,) int8: 1 in the class, 0 in the other, -1 in neither.
    """

    first_row: int
    pooling: csr_array
    documents: np.ndarray
    labels: Mapping[str, np.ndarray]

    def of(self, activations: csr_array) -> csr_array:
        """(n, p) what the examples are, of the activations (n_all_tokens, p) of all text."""
        return self.pooling @ activations[self.first_row : self.first_row + self.pooling.shape[1]]


class Split(NamedTuple):
    """Rows of examples, as many of either class: to fit on, and to test on. No document is in both."""

    train: np.ndarray
    test: np.ndarray


class Score(NamedTuple):
    """On the test rows.

    Attributes:
        accuracy: share of correct answers; 0.5 is chance.
        auc: area under the ROC curve; 0.5 is chance.
    """

    accuracy: float
    auc: float


def split(labels: np.ndarray, documents: np.ndarray, most: tuple[int, int], seed: int) -> Split:
    """Documents at random, three tenths to test on; then equally many rows of both classes, at most ``most`` of each.

    Raises:
        ValueError: where a class is missing on one side.
    """
    rng = np.random.default_rng(seed)
    tested = np.isin(documents, documents_to_test(documents[labels >= 0], rng))
    return Split(_balanced(labels, ~tested, most[0], rng), _balanced(labels, tested, most[1], rng))


def documents_to_test(documents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Three tenths of the documents (n,), at random; each once."""
    names: np.ndarray = rng.permutation(np.unique(documents))
    return names[: round(_TEST_SHARE * len(names))]


def _balanced(labels: np.ndarray, among: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    classes = [np.flatnonzero(among & (labels == value)) for value in (0, 1)]
    n = min(most, *map(len, classes))
    if n < 1:
        raise ValueError(f"{[len(one) for one in classes]} examples of the two classes: give more documents")
    return np.concatenate([rng.permutation(one)[:n] for one in classes])


def by_difference(x: csr_array, y: np.ndarray) -> np.ndarray:
    """Columns of ``x`` (n, p), those whose means differ most between the classes of ``y`` (n,) first."""
    mean = x.mean(axis=0)
    variance = np.maximum(x.power(2).mean(axis=0) - mean**2, 0)
    difference = np.abs(x[y == 1].mean(axis=0) - x[y == 0].mean(axis=0))
    scaled = np.divide(difference, np.sqrt(variance), out=np.zeros_like(difference), where=variance > 1e-12)
    return np.argsort(-scaled, kind="stable")


def fit(x: np.ndarray, y: np.ndarray, penalty: float = 1.0) -> tuple[np.ndarray, float]:
    """Weights (p,) and bias of the logistic regression that minimizes penalty |w|^2 / 2 + the summed cross-entropy."""
    signs = 2.0 * y - 1

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1], parameters[-1]
        margins = signs * (x @ weights + bias)
        slopes = -signs * expit(-margins)
        value = np.logaddexp(0, -margins).sum() + penalty * weights @ weights / 2
        return value, np.append(x.T @ slopes + penalty * weights, slopes.sum())

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    return found[:-1], float(found[-1])


def score(logits: np.ndarray, y: np.ndarray) -> Score:
    """Of logits (n,) against classes (n,)."""
    ranks, n_positive = rankdata(logits), int(y.sum())
    pairs = n_positive * (len(y) - n_positive)
    above = ranks[y == 1].sum() - n_positive * (n_positive + 1) / 2
    return Score(float(((logits > 0) == (y == 1)).mean()), float(above / pairs))


def _fit_and_score(x: np.ndarray, y: np.ndarray, rows: Split, penalty: float) -> Score:
    train, test = x[: len(rows.train)], x[len(rows.train) :]
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation[deviation == 0] = 1
    weights, bias = fit((train - mean) / deviation, y[rows.train], penalty)
    return score((test - mean) / deviation @ weights + bias, y[rows.test])


def _columns(x: csr_array, rows: Split, columns: np.ndarray | slice) -> np.ndarray:
    dense: np.ndarray = x[np.concatenate(rows)][:, columns].toarray()
    return dense.astype(np.float64)


def sparse_probe(x: csr_array, y: np.ndarray, rows: Split, k: int, candidates: np.ndarray) -> tuple[Score, np.ndarray]:
    """The score with k of the ``candidates`` (m,) among the columns of ``x`` (n, p), and which these are."""
    picked = candidates[by_difference(x[rows.train][:, candidates], y[rows.train])[:k]]
    return _fit_and_score(_columns(x, rows, picked), y, rows, penalty=1.0), picked


def random_probe(x: csr_array, y: np.ndarray, rows: Split, k: int, seed: int) -> Score:
    """The score with k columns at random, of those that are not zero on all training rows."""
    used = np.flatnonzero(abs(x[rows.train]).sum(axis=0))
    picked = np.random.default_rng(seed).permutation(used)[:k]
    return _fit_and_score(_columns(x, rows, picked), y, rows, penalty=1.0)


def dense_probe(x: csr_array, y: np.ndarray, documents: np.ndarray, rows: Split, seed: int) -> Score:
    """The score with all columns, at the penalty that is best on a part of the training documents."""
    own = np.full(len(y), -1)
    own[rows.train] = y[rows.train]
    inner = split(own, documents, (len(y), len(y)), seed)
    aucs = [_fit_and_score(_columns(x, inner, slice(None)), y, inner, penalty).auc for penalty in _PENALTIES]
    return _fit_and_score(_columns(x, rows, slice(None)), y, rows, _PENALTIES[int(np.argmax(aucs))])


def interval(values: Sequence[float], test_share: float = _TEST_SHARE) -> dict[str, float]:
    """Mean over splits, and the half width of its 95 % interval.

    Splits share examples: the variance is the corrected one of Nadeau and Bengio (2003), (1 / n + n_test / n_train)
    times that of the values.
    """
    n, ratio = len(values), test_share / (1 - test_share)
    mean = float(np.mean(values))
    if n < 2:
        return {"mean": mean}
    width = t.ppf(0.975, n - 1) * np.sqrt((1 / n + ratio) * np.var(values, ddof=1))
    return {"mean": mean, "plus_minus": float(width)}
