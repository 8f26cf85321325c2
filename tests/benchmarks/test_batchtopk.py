"""What is measured of BatchTopK at a threshold is what its saved SAE does, and the page says what was found."""

import pytest
import torch

from benchmarks.claims import batchtopk
from benchmarks.claims.records import is_among, read
from saelens_asi.evaluation.run import evaluate
from saelens_asi.sweep import Cell, SweepTraining
from saelens_asi.sweep.run import train_cell
from tests.helpers import tiny


def trained(architecture, prepare=None, **changes):
    cell = Cell(architecture=architecture, d_sae=64, k=4, d_init=5, lr=3e-3, **changes)
    training = SweepTraining(training_tokens=60 * 64, batch_size=64)
    return train_cell(cell, training, tiny.activations(1024), prepare=prepare)[0]


@pytest.mark.parametrize("architecture", ["batchtopk", "topk"])
def test_what_is_measured_is_what_an_evaluation_says(architecture):
    sae, x = trained(architecture).sae, tiny.activations(2048)
    found, expected = batchtopk.measured(sae, x), evaluate(sae, activations=x, ranks=False, progress=False)
    for name in ("nmse", "dead_fraction", "l0"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-3)


def test_at_k_as_many_features_fire_as_were_asked_for():
    found = batchtopk.measured(trained("batchtopk").sae, tiny.activations(4096))
    assert found["l0_at_k"] == pytest.approx(4, rel=0.1)
    assert 0 < found["half_share_at_k"] < 0.5
    # A higher threshold lets fewer features fire.
    assert (found["threshold"] < found["threshold_at_k"]) == (found["l0"] > found["l0_at_k"])


def test_what_is_tried_gets_into_the_training():
    seen = []
    trainer = trained("batchtopk", revive="auto", prepare=seen.append)
    assert seen == [trainer]
    assert trainer.sae.cfg.revive == "auto"
    item = batchtopk.Item(contender="", model="", cell=Cell(), bias_correction="per_row")
    item.prepare(trainer)
    assert {group["bias_correction"] for group in trainer.optimizer.param_groups} == {"per_row"}


def test_biases_rise_in_silence_alone():
    trainer = trained("batchtopk")
    trainer.n_forward_passes_since_fired = torch.arange(64) - 33 + batchtopk.SILENT_STEPS
    before = trainer.sae.b_enc.detach().clone()
    for steps_before, share in ((8, 0.0), (batchtopk.RISEN_EVERY - 1, 0.5), (99, 0.5)):  # not again at the end
        trainer.n_training_steps = steps_before
        batchtopk.raise_silent_(trainer, 0.5, steps=100)
        risen = (trainer.sae.b_enc.detach() - before) / trainer.sae.topk_threshold
        assert risen[33:].tolist() == pytest.approx([share] * 31, rel=1e-4)
        assert not risen[:33].any()


def test_longer_runs_are_measured_on_documents_of_their_own(monkeypatch):
    training, held_out = torch.arange(1_000_000.0)[:, None], -torch.arange(200_000.0)[:, None]
    monkeypatch.setattr(batchtopk, "activations", lambda source, hook: (training, held_out))
    for steps, n_training, first in ((292, batchtopk.TRAINED_ON, 310_000.0), (976, 976 * 1024, 0.0)):
        item = batchtopk.Item(contender="", model="smollm2", cell=Cell(), steps=steps)
        seen, measured_on = batchtopk.data(item)
        assert len(seen) == n_training
        assert (len(measured_on), float(measured_on[0])) == (60_000, first)


def test_no_item_is_there_twice_and_results_are_those_of_the_plan():
    keys = [item.key() for item in batchtopk.items()]
    assert all(keys.count(key) == 1 for key in keys)
    assert all(any(is_among([row], key) for key in keys) for row in read(batchtopk.PART))


def test_the_section_has_a_line_for_each_contender_of_a_model_and_size():
    assert batchtopk.section([]) == []
    row = {"model": "smollm2", "d_sae": 64, "contender": "TopK", "nmse": 0.2, "l0": 4.0, "dead_fraction": 0.1,
           "rare_fraction": 0.2, "silent_in_training": 0.0, "steps": 292, "edge_fraction": 0.05}  # fmt: skip
    own = {**row, "contender": "BatchTopK", "nmse_at_k": 0.3, "dead_fraction_at_k": 0.5, "rare_fraction_at_k": 0.6}
    *_, table, _ = batchtopk.section([row, own, {**own, "nmse_at_k": 0.4}])
    assert "| 292 | 64 | TopK | 1 | 0.2000 | 4.0 | 10.0% | 0.2000 | 10.0% | 5.0% |" in table
    assert "| 2 |" in table
    assert "0.3500 (" in table
