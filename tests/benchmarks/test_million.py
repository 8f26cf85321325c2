"""A million features: how a run is told of."""

import torch

from benchmarks.claims import million
from benchmarks.claims.records import read


def _row(**changes):
    row = {"d_sae": 1024, "tokens": 4000, "nmse": 0.25, "l0": 4.0, "silent": [[100_000, 0.5]], "seconds": 1800,
           "peak_gib": 1.5, "threads": 2, "processor": "a processor"}  # fmt: skip
    return {**row, **changes}


def test_the_section_names_what_was_not_counted_by_nothing():
    assert million.section([]) == []
    *_, table, _ = million.section([_row()])
    assert "| 1,024 | 4,000 | 0.2500 | 4.0 | 50.0% | | | | 0.50 | 1.5 | 2 |" in table


def test_a_smaller_sae_with_a_lower_error_is_named():
    smaller = {"d_sae": 64, "tokens": 2000, "nmse": 0.2}
    text = million.section([_row()], [smaller])[2]
    assert "64 have 0.2000 after 2,000 tokens" in " ".join(text.split())
    assert "did not lower" not in million.section([_row(nmse=0.1)], [smaller])[2]


def test_shares_are_of_all_features():
    assert million._share(torch.tensor([True, False, False, False])) == 0.25


def test_the_run_had_a_million_features_and_its_silence_falls_with_the_tokens():
    for row in read(million.PART):
        shares = [share for _, share in row["silent"]]
        assert shares == sorted(shares, reverse=True)
        assert row["d_sae"] == 2**20
