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


def sae_bench_scores(
    saes: Mapping[str, SAE], activations: Tensor, told_apart: Mapping[str, Examples], most: tuple[int, int]
) -> dict[str, dict[str, dict[str, float]]]:
    """By kind of task and SAE, SAEBench's mean accuracies over the classes: ``sae_top_1_test_accuracy`` and the like.

    ``llm_top_1_test_accuracy`` and the like, of raw activations, are the same for all SAEs.

    Raises:
        ImportError: where sae-bench, or what it needs, is not installed.
    """
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    from sae_bench.evals.sparse_probing.main import run_eval_single_dataset

    # With this setting it leaves out the probe on all features at once, the slowest.
    config: Any = SparseProbingEvalConfig(k_values=[*SPARSITIES], lower_vram_usage=True, sae_batch_size=16)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    with _shapes_unchecked():
        for kind, examples in told_apart.items():
            train, test = by_class(activations, examples, most)
            raw = _raw_scores(train, test, config.k_values)
            for name, sae in saes.items():
                with TemporaryDirectory() as folder:
                    path = Path(folder) / f"{kind}_activations.pt"
                    torch.save({"train": train, "test": test, "llm_results": raw}, path)
                    torch.manual_seed(0)
                    mean, _ = run_eval_single_dataset(
                        kind, config, sae, torch.nn.Identity(), -1, "", "cpu", folder, save_activations=False
                    )
                scores.setdefault(kind, {})[name] = {key: value for key, value in mean.items() if value >= 0}
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


def _raw_scores(train: ByClass, test: ByClass, ks: list[int]) -> dict[str, dict[str, float]]:
    from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations
    from sae_bench.sae_bench_utils.activation_collection import create_meaned_model_activations

    torch.manual_seed(0)
    pooled = [create_meaned_model_activations(side) for side in (train, test)]
    _, dense = train_probe_on_activations(*pooled, select_top_k=None)
    found = {"llm_test_accuracy": dense}
    for k in ks:
        _, found[f"llm_top_{k}_test_accuracy"] = train_probe_on_activations(*pooled, select_top_k=k)
    return found
