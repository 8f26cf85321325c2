"""SAEBench's own sparse probing (arXiv 2503.09532) on text of ours, without a hub.

SAEBench (sae-bench 0.6.0) takes its datasets from the hub, but runs without them, and without a model, where the
activations of a dataset are already in its folder of artifacts. This writes them there, and calls its evaluation: its
choice of features (means that differ most, not scaled), its probe (scikit-learn's), its pooling over a window.

    pip install --no-deps sae-bench==0.6.0 scikit-learn joblib threadpoolctl pydantic pydantic-core annotated-types \
        typing-inspection
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jaxtyping
import numpy as np
import torch
from sae_lens import SAE
from torch import Tensor

from benchmarks.claims.probes import SPARSITIES, Examples, documents_to_test

# Activations (n, length, d) by class; of each class as many.
ByClass = dict[str, Tensor]


def by_class(activations: Tensor, examples: Examples, most: tuple[int, int], seed: int = 0) -> tuple[ByClass, ByClass]:
    """What to fit on and what to test on, no document on both sides; as many examples of each class.

    Args:
        activations: (n_tokens, d) of all text.
        examples: all made of equally many tokens.
        most: examples of a class to fit on, and to test on.
        seed: of the documents.
    """
    tasks = {name: labels == 1 for name, labels in examples.labels.items()}
    if len(tasks) == 1:
        (name,) = tasks
        tasks[f"not {name}"] = examples.labels[name] == 0
    rows = examples.pooling.indices.reshape(len(examples.documents), -1) + examples.first_row
    rng = np.random.default_rng(seed)
    tested = np.isin(examples.documents, documents_to_test(examples.documents, rng))
    found = []
    for side, n in ((~tested, most[0]), (tested, most[1])):
        members = {name: np.flatnonzero(side & chosen) for name, chosen in tasks.items()}
        n = min(n, *map(len, members.values()))
        found.append({name: activations[rows[rng.permutation(one)[:n]]].float() for name, one in members.items()})
    return found[0], found[1]


@dataclass(frozen=True)
class Classes:
    """What SAEBench tells apart of one kind, and how well dimensions of the activations do so.

    Attributes:
        train: to fit on.
        test: to test on.
        raw: by class, of ``llm_top_1_test_accuracy`` and the like.
    """

    train: ByClass
    test: ByClass
    raw: dict[str, dict[str, float]]

    @classmethod
    def of(cls, activations: Tensor, examples: Examples, most: tuple[int, int]) -> Classes:
        """Raises ImportError where sae-bench, or what it needs, is not installed."""
        train, test = by_class(activations, examples, most)
        with _shapes_unchecked():
            return cls(train, test, _raw_scores(train, test))


def sae_bench_scores(sae: SAE, told_apart: Mapping[str, Classes]) -> dict[str, dict[str, float]]:
    """By kind of task, SAEBench's mean accuracies over the classes: ``sae_top_1_test_accuracy`` and the like.

    ``llm_top_1_test_accuracy`` and the like, of raw activations, are the same for all SAEs.

    Raises:
        ImportError: where sae-bench, or what it needs, is not installed.
    """
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    from sae_bench.evals.sparse_probing.main import run_eval_single_dataset

    # With this setting it leaves out the probe on all features at once, the slowest.
    config: Any = SparseProbingEvalConfig(k_values=[*SPARSITIES], lower_vram_usage=True, sae_batch_size=16)
    scores: dict[str, dict[str, float]] = {}
    with _shapes_unchecked():
        for kind, classes in told_apart.items():
            with TemporaryDirectory() as folder:
                path = Path(folder) / f"{kind}_activations.pt"
                torch.save({"train": classes.train, "test": classes.test, "llm_results": classes.raw}, path)
                torch.manual_seed(0)
                mean, _ = run_eval_single_dataset(
                    kind, config, sae, torch.nn.Identity(), -1, "", "cpu", folder, save_activations=False
                )
            scores[kind] = {key: value for key, value in mean.items() if value >= 0}
    return scores


@contextmanager
def _shapes_unchecked() -> Iterator[None]:
    """SAEBench gives one name to two sizes (probe_training.py, ``train_dataset_size``), which beartype 0.23 notices."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def _raw_scores(train: ByClass, test: ByClass) -> dict[str, dict[str, float]]:
    from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations
    from sae_bench.sae_bench_utils.activation_collection import create_meaned_model_activations

    torch.manual_seed(0)
    pooled = [create_meaned_model_activations(side) for side in (train, test)]
    _, dense = train_probe_on_activations(*pooled, select_top_k=None)
    found = {"llm_test_accuracy": dense}
    for k in SPARSITIES:
        _, found[f"llm_top_{k}_test_accuracy"] = train_probe_on_activations(*pooled, select_top_k=k)
    return found
