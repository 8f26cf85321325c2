"""Up to a million features: how the runs are told of."""

import torch

from benchmarks.claims import scaling
from benchmarks.claims.records import read


def _row(**changes):
    settings = {"d_sae": 1024, "tokens": 4000, "k": 4, "lr": 0.001, "threads": 2, "processor": "a processor"}
    measured = {"nmse": 0.25, "l0": 4.0, "silent": [[100_000, 0.5]], "seconds": 1800, "peak_gib": 1.5}
    return {**settings, **measured, **changes}


def test_the_section_names_what_was_not_counted_by_nothing():
    assert scaling.section([]) == []
    *_, table, _ = scaling.section([_row()])
    assert "| 1,024 | 4,000 | 0.001 | 0.2500 | 4.0 | 50.0% | | | | 0.50 | 1.5 | 2 |" in table


def test_errors_that_do_not_fall_are_said_not_to():
    rows = [_row(d_sae=1024 * 4**i, nmse=0.25 * 4 ** (-0.1 * i)) for i in range(3)]
    falling, rising = (" ".join(scaling.section(some)[2].split()) for some in (rows, [*rows, _row(d_sae=2**17)]))
    assert "the exponent -0.100 (residual 0.0%); the lowest error is that of 16,384 features" in falling
    assert "did not lower" not in falling
    assert "did not lower the error here" in rising
    assert "131,072 features each fires 0 times in training, of 1,024 16 times" in rising


def test_shares_are_of_all_features():
    assert scaling._share(torch.tensor([True, False, False, False])) == 0.25


def test_the_run_had_a_million_features_and_its_silence_falls_with_the_tokens():
    rows = read(scaling.PART)
    for row in rows:
        shares = [share for _, share in row["silent"]]
        assert shares == sorted(shares, reverse=True)
    assert max(row["d_sae"] for row in rows) == 2**20
