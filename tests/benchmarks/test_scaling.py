"""Up to a million features: how the runs are told of."""

import torch

from benchmarks.claims import scaling
from benchmarks.claims.records import read


def _row(**changes):
    settings = {"d_sae": 1024, "tokens": 4000, "k": 4, "lr": 0.001, "threads": 2, "processor": "a processor"}
    measured = {
        "nmse": 0.25,
        "l0": 4.0,
        "silent": [[100_000, 0.5]],
        "seconds": 1800,
        "cpu_seconds": 900,
        "peak_gib": 1.5,
    }
    return {**settings, **measured, **changes}


def test_the_section_names_what_was_not_counted_by_nothing():
    assert scaling.section([]) == []
    *_, table, _ = scaling.section([_row()])
    assert "| 1,024 | stay | 4,000 | 0.001 | 0.2500 | 4.0 | 50.0% | | | | 0.50 | 0.25 | 1.5 | 2 |" in table


def test_the_power_law_ends_where_the_error_falls_no_more():
    rows = [_row(d_sae=1024 * 4**i, nmse=0.25 * 4 ** (-0.1 * i)) for i in range(3)]
    worse = _row(d_sae=2**17, nmse=2 * rows[-1]["nmse"])
    falling, rising = (" ".join(scaling.section(some)[2].split()) for some in (rows, [*rows, worse]))
    law = "from 1,024 to 16,384 features the error falls, as a power law with the exponent -0.100 (residual 0.0%)."
    assert law in falling
    assert falling.endswith(law)
    assert law in rising
    assert "at 131,072, where it fires 0 times, it is 100.0% higher" in rising
    assert "did not lower" not in rising


def test_errors_that_do_not_fall_are_said_not_to():
    text = " ".join(scaling.section([_row(), _row(d_sae=2048, nmse=0.3)])[2].split())
    assert "Moments that stay: **more features did not lower the error here.** It is the lowest at 1,024" in text


def test_moments_that_stay_and_that_decay_have_a_law_each():
    rows = [_row(d_sae=1024 * 2**i, nmse=0.25 * 2 ** (-0.1 * i)) for i in range(2)]
    decaying = [{**row, "silent_moments": "decay", "nmse": row["nmse"] ** 2} for row in rows]
    text = " ".join(scaling.section([*rows, *decaying])[2].split())
    assert (
        "Moments that stay: from 1,024 to 2,048 features the error falls, as a power law with the exponent -0.1" in text
    )
    assert (
        "Moments that decay: from 1,024 to 2,048 features the error falls, as a power law with the exponent -0.2"
        in text
    )


def test_the_largest_is_trained_with_moments_that_stay():
    sizes = {(cell.d_sae, cell.silent_moments) for cell in scaling.cells()}
    assert (scaling.LARGEST, "keep") in sizes
    assert (scaling.LARGEST, "decay") not in sizes
    assert len({scaling.checkpoints(cell) for cell in scaling.cells()}) == len(scaling.cells()) == len(sizes)


def test_each_size_is_trained_in_a_process_of_its_own(monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(scaling, "read", lambda part: [])
    monkeypatch.setattr(scaling.subprocess, "run", lambda command, check: commands.append(command[3:]))
    monkeypatch.setattr("sys.argv", ["scaling", "--d-sae", "1024", "2048", "--moments", "decay"])
    scaling.main()
    assert commands == [["--d-sae", size, "--moments", "decay"] for size in ("1024", "2048")]


def test_shares_are_of_all_features():
    assert scaling._share(torch.tensor([True, False, False, False])) == 0.25


def test_the_run_had_a_million_features_and_its_silence_falls_with_the_tokens():
    rows = read(scaling.PART)
    for row in rows:
        shares = [share for _, share in row["silent"]]
        assert shares == sorted(shares, reverse=True)
    assert max(row["d_sae"] for row in rows) == 2**20
