"""What many processes cost by arithmetic is what real ones send and hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAETrainer

from benchmarks import sharding
from benchmarks import sharding_costs as costs
from benchmarks.sharding import Run
from benchmarks.sharding_costs import H100, Mesh, Sizes
from saelens_asi.sparse.kernels import load_kernels
from saelens_asi.sparse.screens import EightBit
from saelens_asi.sparse.topk import Encoder
from tests.helpers.processes import in_processes

SIZES = Sizes(d_in=24, d_sae=64, k=4, batch=32)
LARGE = Sizes(d_in=4096, d_sae=2**20, k=64, batch=65_536)


@pytest.mark.parametrize("mesh", [Mesh(2), Mesh(1, 2)])
def test_real_steps_send_the_bytes_of_the_formula(mesh: Mesh) -> None:
    cell = sharding.compare(Run(SIZES, mesh, n_steps=12))  # of which the tenth is recorded
    for sent, (least, most) in zip(cell["counted_bytes"], cell["formula_bytes"], strict=True):
        assert least == most == pytest.approx(sent, rel=1e-9)
    assert cell["agrees"]
    assert min(cell["counted_bytes"]) > 0


def test_a_batchtopk_sends_no_more_and_no_less_than_the_formula_says() -> None:
    assert sharding.compare(Run(SIZES, Mesh(2), n_steps=12, architecture="batchtopk"))["agrees"]


def test_bytes_depend_on_the_tokens_and_not_on_the_features() -> None:
    few, many = (sum(costs.step_bytes(LARGE._replace(d_sae=d_sae), Mesh(8), 0).values()) for d_sae in (2**11, 2**24))
    assert few == many
    assert costs.batch_step_bytes(LARGE, Mesh(8)) == costs.batch_step_bytes(LARGE._replace(d_sae=2**24), Mesh(8))


def test_nothing_travels_where_a_process_is_alone() -> None:
    assert set(costs.all_bytes(LARGE, Mesh(1), active=1000).values()) == {0.0}


def _held(run: Run) -> dict[str, int]:
    found: dict[str, int] = {}

    def n_bytes(*tensors: torch.Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def watch(trainer: SAETrainer[Any, Any], step: int) -> None:
        if step:
            states = [trainer.optimizer.state[param] for param in trainer.sae.parameters()]
            found["weights"] = n_bytes(*trainer.sae.parameters())
            found["moments"] = n_bytes(*(state[name] for state in states for name in ("exp_avg", "exp_avg_sq")))
            found["norms"] = n_bytes(trainer._sparse_steps.decoder_norms)
            found["counters"] = n_bytes(trainer.act_freq_scores, trainer.n_forward_passes_since_fired)

    run.trainer(run.batches(), watch).fit()
    return found


@pytest.mark.parametrize("mesh", [Mesh(1), Mesh(2), Mesh(1, 2)])
def test_a_process_holds_the_bytes_of_the_formula(mesh: Mesh) -> None:
    for found in in_processes(mesh.n, _held, Run(SIZES, mesh, n_steps=2)):
        assert found == costs.state_bytes(SIZES, mesh)


@pytest.mark.skipif(load_kernels() is None, reason="without numba there are no 8-bit copies")
def test_copies_of_eight_bits_hold_the_bytes_of_the_formula() -> None:
    codes, terms = vars(EightBit.of(Encoder(torch.randn(64, 24), torch.zeros(64)))).values()
    assert codes.numel() + 4 * terms.numel() == costs.screen_bytes(SIZES, Mesh(1))


def test_more_gpus_take_less_memory_and_the_best_mesh_is_no_slower() -> None:
    held = [sum(costs.state_bytes(LARGE, Mesh(n)).values()) for n in (8, 16, 32)]
    assert held == sorted(held, reverse=True)
    for n in (8, 64, 512):
        best = costs.best_mesh(LARGE, n, H100)
        assert best is not None
        assert best.n == n
        assert costs.step_seconds(LARGE, best, H100) <= costs.step_seconds(LARGE, Mesh(n), H100)
        assert costs.efficiency(LARGE, best, H100) <= 1


def test_the_table_says_where_there_is_no_room() -> None:
    lines = sharding.report_of_gpus(LARGE._replace(d_sae=2**24), H100, (8, 64)).splitlines()
    assert lines[0] == "d_in = 4,096, d_sae = 16,777,216, k = 64, batch = 65,536; H100 with 80 GB"
    assert lines[-2].startswith("| 8 | ")
    assert "(no room)" in lines[-2]
    assert "none has room" in lines[-2]
    assert "no room" not in lines[-1]


def test_the_tables_of_the_page_are_those_of_today() -> None:
    page = (sharding.ROOT / "docs" / "many_processes.md").read_text()
    for table in sharding.tables(sharding.parse(["table"])):
        assert f"\n{table}\n" in page


def test_sides_that_take_turns_take_as_many() -> None:
    runs = {name: Run(SIZES, mesh, n_steps=6) for name, mesh in (("one", Mesh(1)), ("two", Mesh(2)))}
    seconds = sharding.side_by_side(runs, steps_a_turn=2)
    assert {name: len(of_side) for name, of_side in seconds.items()} == {"one": 3, "two": 3}


def test_the_report_of_a_measurement_has_both_tables() -> None:
    memory = [
        {"processes": 1, "d_sae": 64, "peak": 6 * 2**30, "weights": 2**30, "moments": 2**31},
        {"processes": 2, "d_sae": 64, "peak": 4 * 2**30, "weights": 2**29, "moments": 2**30},
    ]
    seconds = {"one process, two threads": [1.0, 2.0, 3.0], "two processes share features": [1.0]}
    result = {"machine": {"cpu": "Processor"}, **SIZES._asdict(), "activations": "random", "seconds": seconds}
    assert sharding.report_of_speed({**result, "memory": memory}).splitlines() == [
        "Processor; d_in = 24, d_sae = 64, k = 4, batch = 32, random activations",
        "",
        "| side | s a step | x one process |",
        "|---|---:|---:|",
        "| one process, two threads | 2.000 | 1.00 |",
        "| two processes share features | 1.000 | 0.50 |",
        "",
        "d_sae = 64",
        "",
        "| processes | peak, GiB | weights and moments | beyond these | 1/N of one process | above it |",
        "|---:|---:|---:|---:|---:|---:|",
        "| 1 | 6.00 | 3.00 | 3.00 | 6.00 | 0.00 |",
        "| 2 | 4.00 | 1.50 | 2.50 | 3.00 | 1.00 |",
    ]
