"""The measurement on a GPU, as far as it goes without one."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from benchmarks import gpu


def _small(**changes: Any) -> argparse.Namespace:
    args = gpu.parse([])
    settings = {"d_sae": 256, "d_in": 32, "k": 4, "batch": 64, "steps": 1, "repeats": 2, "warm_up": 1, "device": "cpu"}
    return argparse.Namespace(**{**vars(args), **settings, "autocast": False, **changes})


def test_the_report_says_what_was_measured_and_what_was_not():
    cells = {
        "32768 576 bf16 floor": {"seconds": [0.002, 0.001, 0.003], "bytes": 2**30},
        "32768 576 bf16 ours": {"seconds": [0.004], "bytes": 3 * 2**29, "parts": {"decode": 0.001, "other": 0.0005}},
        "1048576 4096 bf16 stock": {"skipped": "needs about 103 GiB of 79"},
    }
    result = {"machine": {"gpu": "Card"}, "batch": 4096, "k": 32, "checks": {"clip": 1e-7}, "cells": cells}
    assert gpu.report(result).splitlines() == [
        "Card; batch = 4,096, k = 32",
        "",
        "clip: 1.0e-07",
        "",
        "| d_sae | d_in | precision | side | ms a step | tokens a second | GiB | x floor |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| 32768 | 576 | bf16 | floor | 2.00 | 2,048,000 | 1.00 | 1.00 |",
        "| 32768 | 576 | bf16 | ours | 4.00 | 1,024,000 | 1.50 | 2.00 |",
        "| 1048576 | 4096 | bf16 | stock | needs about 103 GiB of 79 | | | |",
        "",
        "32768 576 bf16 ours, ms: decode 1.00, other 0.50",
    ]


def test_kernels_belong_to_the_parts_of_a_step():
    kernels = [("_group_maxima", 3.0), ("_move_rows", 1.0), ("_move_vector", 0.5), ("DeviceRadixSortOnesweep", 0.25)]
    found = gpu.by_part([*kernels, ("at::native::elementwise", 1.0)])
    assert found == {"first product": 3.0, "Adam": 1.5, "sorting": 0.25, "other": 1.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == gpu.NO_GPU
    assert "no GPU here" in capsys.readouterr().err


def test_what_has_no_memory_is_not_tried():
    args = _small()
    assert "skipped" in gpu.run_cell(args, (2**20, 4096, "bf16", "stock"), available=80 * 2**30)
    assert gpu.needed_bytes("ours", 2**20, 576, 4096) < 80 * 2**30
    assert gpu.needed_bytes("ours", 2**17, 4096, 4096) < 80 * 2**30


def test_every_side_has_a_cell_for_each_precision_and_the_floor_one():
    found = gpu.cells(gpu.parse(["--sides", "floor", "ours"]))
    assert len(found) == len(gpu.D_SAE) * len(gpu.D_IN) * 4
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("side", ["floor", "stock", "ours"])
def test_a_cell_is_measured(side):
    cell = gpu.run_cell(_small(), (256, 32, "float32", side), available=2**40)
    assert len(cell["seconds"]) == 2


def test_the_checks_pass_where_both_are_the_twins():
    kernels = gpu.check_kernels("cpu", d_in=40, d_sae=300, k=5, n=80)
    same_bits = {f"both products have the same bits in {name}" for name in gpu.PRECISIONS}
    assert kernels.keys() | {"note_"} == gpu.OPERATORS.keys() | same_bits
    steps = gpu.check_steps(_small(), n_steps=2)
    assert gpu.failed({**kernels, **steps}) == []
    assert gpu.failed({"a": 1.0, "b": float("nan"), "c": 0.0}) == ["a", "b"]
