"""Memory by arithmetic against the peaks of real runs, each in a process of its own."""

from __future__ import annotations

import json

import pytest

from benchmarks.plan_costs import RESULTS, peak_of_run
from saelens_asi.planning.memory import GIB, parse_bytes, run_memory, store_bytes, weight_bytes
from tests.helpers import tiny


@pytest.mark.parametrize("size", [(256, 1024, 16, 512), (256, 16384, 16, 512)])
def test_the_peak_of_a_real_run_is_within_fifteen_per_cent(size):
    found = peak_of_run(*size)
    assert run_memory(*size, store=found["activations"]).peak == pytest.approx(found["peak"], rel=0.15)


def test_the_peaks_that_were_measured_are_within_fifteen_per_cent():
    for row in json.loads((RESULTS / "memory.json").read_text()):
        predicted = run_memory(row["d_in"], row["d_sae"], row["k"], row["batch"], store=row["activations"])
        assert predicted.peak == row["predicted"]
        assert predicted.peak == pytest.approx(row["peak"], rel=0.15)


def test_weights_are_those_of_the_sae():
    sae = tiny.training_sae(d_sae=48)
    assert weight_bytes(tiny.D_MODEL, 48) == sum(p.numel() * p.element_size() for p in sae.parameters())


def test_memory_grows_with_everything_that_is_held():
    base = run_memory(576, 8192, 32, 1024)
    assert base.peak < run_memory(576, 16384, 32, 1024).peak < run_memory(576, 16384, 32, 1024, stock=True).peak
    assert run_memory(576, 8192, 32, 1024, model=GIB).peak == base.peak + GIB
    assert run_memory(576, 8192, 32, 1024, store=store_bytes(576, 1024)).peak > base.peak
    assert base.disk == 2 * base.checkpoint + base.sae == 7 * base.weights
    assert base.to_dict()["peak"] == base.peak


def test_saelens_own_step_is_as_large_as_it_was_measured():
    """benchmarks/results/train_step_smollm2_32768_cpu.json: above weights and moments, 3,900,198,912 bytes."""
    memory = run_memory(576, 32768, 32, 4096, stock=True)
    assert memory.gradients + memory.scratch == pytest.approx(3_900_198_912, rel=0.05)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("24GiB", 24 * GIB), ("24 gib", 24 * GIB), ("24G", 24 * GIB), ("1.5MB", 1_500_000), (1000, 1000), ("512", 512)],
)
def test_amounts_of_memory_are_read(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "-1GiB", 0, True, "1.2.3GiB"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match=r"is no amount of memory: give bytes, or a text such as '24GiB'"):
        parse_bytes(text)
