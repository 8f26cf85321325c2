"""Benchmarks keep running as the package changes: each imports, and those that reach inside find what they time."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from typing import Any

import pytest
import torch

import benchmarks
from benchmarks import ablation, ablation_report, lorsa, train_step, training_run

MODULES = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.") if not module.ispkg]


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_imports(name: str) -> None:
    importlib.import_module(name)


def small(**changes: Any) -> argparse.Namespace:
    settings: dict[str, Any] = {"d_in": 32, "d_sae": 256, "k": 4, "batch": 64, "activations": "random", "steps": 16}
    settings |= {"device": "cpu", "autocast": False, "repeats": 1, "warm_up": 1, "sides": ["floor", "stock", "ours"]}
    return argparse.Namespace(**{**settings, **changes})


def test_the_parts_of_a_training_step_are_found() -> None:
    args = small()
    data = train_step.batches(args)
    stock = train_step.Activations.decode
    parts = train_step.parts_of_a_step(args, data)
    assert {"encoder and top-k", "decoding", "gradients of the rows", "SparseAdam", "whole step"} <= parts.keys()
    assert parts["encoder and top-k"] > 0
    assert train_step.Activations.decode is stock
    assert train_step.measure_times(args, data).keys() == {"floor", "stock", "ours"}


def test_the_report_of_a_training_step_has_a_table_a_kind() -> None:
    parts = {"decoding": 0.25, "whole step": 0.5}
    result = {"d_in": 576, "d_sae": 32768, "k": 32, "batch": 4096, "activations": "random", "parts": parts}
    result |= {"bytes": {"floor": 2**30}, "seconds": {"floor": [1.0, 2.0, 3.0], "ours": [1.0]}}
    assert train_step.report({**result, "parts_without_screen": parts}).splitlines() == [
        "d_in = 576, d_sae = 32,768, k = 32, batch = 4,096; random activations",
        "",
        "| side | s a step | x floor | GiB |",
        "|---|---|---|---|",
        "| floor | 2.000 | 1.00 | 1.00 |",
        "| ours | 1.000 | 0.50 | |",
        "",
        "| part of our step | s | share |",
        "|---|---|---|",
        "| decoding | 0.250 | 50.0% |",
        "| whole step | 0.500 | 100.0% |",
        "",
        "| part of our step with the whole product | s | share |",
        "|---|---|---|",
        "| decoding | 0.250 | 50.0% |",
        "| whole step | 0.500 | 100.0% |",
    ]


def test_a_training_run_is_compared_with_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(training_run, "activations", lambda *_: (x, x))
    rows, seconds = training_run.measure(small())
    assert [row["step"] for row in rows] == [5, 15]
    assert len(seconds) == 16
    assert sum(row["differing_features"] for row in rows) == 0


def test_the_ablations_tables_are_those_of_the_committed_page() -> None:
    page = (ablation.RESULTS / "ablation.md").read_text()
    rows = {grid: ablation_report.read(grid) for grid in ablation.grids()}
    for part in (
        ablation_report.table(rows["factors"], ["subspace", "norm", "center", "optimizer"]),
        ablation_report.effects(rows["factors"]),
        ablation_report.reading(rows["factors"]),
        ablation_report.table(rows["bias"], ["center", "seed", "bias_correction"]),
    ):
        assert f"\n{part}\n" in page


def test_lorsas_tables_are_those_of_the_committed_page() -> None:
    assert f"\n{lorsa.report(lorsa.RESULTS)}\n" in (lorsa.RESULTS / "lorsa.md").read_text()
