"""Rivals are trained as ``train_cell`` trains, and each does what its source says."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from benchmarks.claims import rival_sparsify, rival_trainers
from benchmarks.claims.rival_trainers import KAnnealing, Resampling, Run, Whitening, align_, folded
from benchmarks.claims.rivals import RIVALS, rival_cell, train_rival
from saelens_asi import SparseAdam, evaluate
from saelens_asi.sweep import Cell, SweepTraining
from saelens_asi.sweep import run as sweep_run

D_IN, D_SAE, K = 16, 48, 4
TRAINING = SweepTraining(training_tokens=64 * 24, batch_size=64, dead_after_tokens=64 * 4)
CELL = Cell(d_sae=D_SAE, k=K, d_init=0.75, lr=3e-3)


HAS_SPARSIFY = all(importlib.util.find_spec(name) for name in ("sparsify", "schedulefree", "natsort"))
NEEDS_SPARSIFY = pytest.mark.skipif(not HAS_SPARSIFY, reason=rival_sparsify.INSTALL)
NAMES = [pytest.param(name, marks=NEEDS_SPARSIFY) if name == "signum_multi_topk" else name for name in RIVALS]


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0, -3, D_IN).exp()
    return torch.randn(1000, D_IN, generator=generator) * scales + scales.flip(0)


def trainer_of(sae: TopKTrainingSAE) -> SAETrainer:
    config = SAETrainerConfig(total_training_samples=64, train_batch_size_samples=64, lr=1e-3, lr_end=1e-4)
    return SAETrainer(config, sae, iter(()))


def untrained(**changes: Any) -> TopKTrainingSAE:
    torch.manual_seed(0)
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, **changes))


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[torch.Tensor]:
    """Fills with the batches of training, those of the estimate of a subspace left out, that ``module`` draws."""
    stock, drawn = sweep_run._batches, []

    def batches(data, training, n=None):
        for batch in stock(data, training, n):
            if n is None:
                drawn.append(batch)
            yield batch

    monkeypatch.setattr(module, "_batches", batches)
    return drawn


@pytest.fixture(scope="module")
def batches_of_a_cell(activations) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        drawn = recorded(monkeypatch, sweep_run)
        sweep_run.train_cell(CELL, TRAINING, activations)
    return drawn


@pytest.mark.parametrize("name", NAMES)
def test_a_rival_lowers_the_error_of_its_start_on_the_batches_of_a_cell(
    name, activations, batches_of_a_cell, monkeypatch
):
    """What is watched and what comes back are SAEs of raw activations with k features."""
    drawn = recorded(monkeypatch, rival_sparsify if name == "signum_multi_topk" else rival_trainers)
    monkeypatch.setattr(rival_trainers, "_n_estimate_batches", lambda run: 3)
    n_estimate = 3 if "whitening" in name else 0  # which reads them too
    seen: list[int] = []
    errors: list[float] = []

    def watch(n_tokens, sae):
        seen.append(n_tokens)
        if len(seen) in (1, 12):
            found = evaluate(sae, activations=activations, ranks=False, progress=False)
            assert found.l0 <= K
            errors.append(found.nmse)

    sae, record = train_rival(name, CELL, TRAINING, activations, watch)
    assert seen == [64 * step for step in range(1, TRAINING.steps)]
    assert evaluate(sae, activations=activations, ranks=False, progress=False).nmse < 0.9 * errors[0]
    assert errors[1] < errors[0]
    assert min(record["seconds"], record["cpu_seconds"]) >= 0
    assert len(drawn) == n_estimate + TRAINING.steps
    for batch, of_cell in zip(drawn[n_estimate:], batches_of_a_cell, strict=True):
        torch.testing.assert_close(batch, of_cell, rtol=0, atol=0)


def test_a_method_that_does_nothing_is_train_cell(activations):
    cell = replace(CELL, optimizer="adam")
    sae, _ = rival_trainers.train_with(rival_trainers.Method, Run(cell, TRAINING, activations, 0.0), None)
    trainer, _ = sweep_run.train_cell(cell, TRAINING, activations)
    for name, values in trainer.sae.state_dict().items():
        torch.testing.assert_close(sae.state_dict()[name], values, rtol=0, atol=0)


def test_unknown_rivals_and_settings_are_refused(activations):
    with pytest.raises(ValueError, match="must be one of"):
        train_rival("nobody", CELL, TRAINING, activations)
    with pytest.raises(ValueError, match="has no setting"):
        train_rival("aligned", CELL, TRAINING, activations, setting=0.5)


def test_aligned_rows_have_inner_product_1_from_start_to_end(activations):
    products = []

    def watch(n_tokens, sae):
        products.append((sae.W_enc.t() * sae.W_dec).sum(dim=1))

    sae, _ = train_rival("aligned", CELL, TRAINING, activations, watch)
    products.append((sae.W_enc.t() * sae.W_dec).sum(dim=1))
    for product in products:
        torch.testing.assert_close(product, torch.ones(D_SAE), rtol=0, atol=1e-5)
    assert float((sae.W_enc.t() - sae.W_dec).detach().abs().max()) > 1e-2  # not merely tied


def test_aligning_moves_an_encoder_row_along_its_decoder_row_alone():
    sae = untrained()
    sae.W_enc.data.normal_()
    before = sae.W_enc.detach().clone()
    align_(sae)
    torch.testing.assert_close((sae.W_enc.t() * sae.W_dec).sum(dim=1), torch.ones(D_SAE))
    moved, direction = (sae.W_enc - before).t(), torch.nn.functional.normalize(sae.W_dec, dim=1)
    torch.testing.assert_close(moved, (moved * direction).sum(dim=1, keepdim=True) * direction, rtol=1e-4, atol=1e-5)


def test_aligned_gradients_are_those_through_the_reparameterization(activations):
    sae = untrained(aux_loss_coefficient=0.0)
    sae.b_enc.data.normal_()
    align_(sae)
    free = sae.W_enc.detach().t().clone().requires_grad_()
    decoder = sae.W_dec.detach().clone().requires_grad_()
    squares = decoder.square().sum(dim=1, keepdim=True)
    encoder = free + (1 - (free * decoder).sum(dim=1, keepdim=True)) * decoder / squares
    biases = {"b_enc": sae.b_enc, "b_dec": sae.b_dec}
    weights = {"W_enc": encoder.t(), "W_dec": decoder, **biases}
    torch.func.functional_call(sae, weights, (activations,)).sub(activations).square().sum().backward()

    sae(activations).sub(activations).square().sum().backward()
    rival_trainers.align_gradients_(sae)
    torch.testing.assert_close(sae.W_enc.grad.t(), free.grad, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(sae.W_dec.grad, decoder.grad, rtol=1e-3, atol=1e-2)
    assert float(free.grad.abs().max()) > 10


def test_k_falls_from_the_width_to_the_cells(activations):
    used: list[int] = []
    stock = KAnnealing.between

    def between(self, step):
        stock(self, step)
        used.append(self.sae.activation_fn.k)

    with mock.patch.object(KAnnealing, "between", between):
        sae, _ = train_rival("k_annealing", CELL, TRAINING, activations, setting=0.5)
    assert used[0] == D_IN
    # As update_annealed_k of dictionary_learning has it, with k_anneal_steps = 12.
    assert used == [int(D_IN * (1 - r) + K * r) for r in (min(t, 12) / 12 for t in range(TRAINING.steps + 1))]
    assert sae.activation_fn.k == K
    assert evaluate(sae, activations=activations, ranks=False, progress=False).l0 <= K


def test_resampling_revives_dead_features_as_badly_reconstructed_inputs(activations):
    sae = untrained()
    sae.b_dec.data.copy_(activations.mean(dim=0))
    dead = torch.tensor([3, 11, 40])
    sae.b_enc.data[dead] = -1e3
    trainer = trainer_of(sae)
    trainer.step(activations[:64])
    assert all(bool((state["exp_avg_sq"] > 0).any()) for state in trainer.optimizer.state.values())
    is_dead = torch.zeros(D_SAE, dtype=torch.bool).index_fill_(0, dead, True)
    live = evaluate(sae, activations=activations, ranks=False, progress=False).firing_counts
    assert not bool(live[dead].any())
    for state in trainer.optimizer.state.values():
        state["exp_avg"].fill_(1.0)
        state["exp_avg_sq"].fill_(1.0)
    norms, decoder_norms = sae.W_enc.norm(dim=0)[~is_dead].mean(), sae.W_dec.norm(dim=1)[~is_dead].mean()
    others = sae.W_dec.detach()[~is_dead].clone()
    outlier = torch.full((1, D_IN), 30.0)  # with nearly all of the squared loss
    run = Run(CELL, TRAINING, torch.cat([activations, outlier]), setting=0.9)
    assert Resampling(trainer, run).resample_(is_dead) == 3

    torch.testing.assert_close(sae.W_enc.norm(dim=0)[dead], (0.9 * norms).expand(3))
    torch.testing.assert_close(sae.W_dec.norm(dim=1)[dead], decoder_norms.expand(3))
    torch.testing.assert_close(sae.W_dec[~is_dead], others, rtol=0, atol=0)
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec[dead], outlier - sae.b_dec)
    assert float(cosines.detach().max()) > 0.999
    assert not bool(sae.b_enc[dead].any())
    for param, dim in ((sae.W_enc, 1), (sae.b_enc, 0), (sae.W_dec, 0)):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = trainer.optimizer.state[param][name].movedim(dim, 0)
            assert not bool(moment[dead].any())
            assert bool((moment[~is_dead] == 1).all())
    counts = evaluate(sae, activations=run.activations, ranks=False, progress=False).firing_counts
    assert bool((counts[dead] > 0).all())


def test_of_as_many_candidates_as_are_wanted_all_are_taken_without_a_look(activations):
    sae = untrained()
    method = Resampling(trainer_of(sae), Run(CELL, TRAINING, activations, setting=0.2))
    with mock.patch.object(rival_trainers, "_N_CANDIDATES", 4), mock.patch.object(sae, "encode") as encode:
        inputs = method._badly_reconstructed(40)
    assert not encode.called
    assert inputs.shape == (40, D_IN)
    assert len(inputs.unique(dim=0)) == 40


def test_a_method_starts_from_saelens_own_weights_too(activations):
    """Nothing is estimated then, and no batch without tokens comes before the first."""
    sae, _ = rival_trainers.train_with(
        Resampling, Run(replace(CELL, initializer="default"), TRAINING, activations, 0.2), None
    )
    assert evaluate(sae, activations=activations, ranks=False, progress=False).nmse < 2


def test_resampling_looks_at_its_shares_of_the_run_for_what_was_silent(activations):
    asked: list[tuple[int, int]] = []

    def resample_(self, is_dead):
        asked.append((self.trainer.n_training_steps, int(is_dead.sum())))
        return 0

    with mock.patch.object(Resampling, "resample_", resample_):
        train_rival("resampling", CELL, TRAINING, activations)
    assert [step for step, _ in asked] == [3, 6, 9, 12]


def test_the_authors_sparse_adam_is_the_update_that_they_released():
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(6, 5, generator=generator)
    theirs, exp_avg, exp_avg_sq = param.double(), torch.zeros(6, 5).double(), torch.zeros(6, 5).double()
    ours = torch.nn.Parameter(param.double())
    optimizer = SparseAdam([{"params": [ours], "row_dim": 0}], lr=1e-2)
    rival_trainers.use_authors_options_(optimizer)
    for n in range(1, 31):
        # Gradients that are not far above eps, and rows that are silent for long; never all.
        grad = 1e-6 * torch.randn(6, 5, generator=generator).double()
        silent = torch.rand(6, generator=generator) < 0.7
        silent[int(torch.randint(6, (1,), generator=generator))] = False
        grad[silent] = 0.0
        ours.grad = grad.clone()
        optimizer.step()
        fires = grad != 0
        exp_avg = 0.9 * exp_avg + torch.where(fires, 0.1 * grad, 0)
        exp_avg_sq = 0.999 * exp_avg_sq + torch.where(fires, 0.001 * grad * grad, 0)
        size = 1e-2 * (1 - 0.999**n) ** 0.5 / (1 - 0.9**n)
        theirs -= torch.where(fires, size * exp_avg / (exp_avg_sq.sqrt() + 1e-8), 0)
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-12)


def test_the_moments_of_silent_rows_decay_in_the_authors_sparse_adam_alone(activations):
    sae = untrained(optimizer="sparse_adam", aux_loss_coefficient=0.0)
    ours = trainer_of(sae)
    theirs = trainer_of(copy.deepcopy(sae))
    rival_trainers.AuthorsSparseAdam(theirs, Run(CELL, TRAINING, activations, 0.0))
    for trainer in (ours, theirs):
        trainer.sae.b_enc.data[7] = 10.0  # fires on every token, in this step alone
        trainer.step(activations[:64])
        trainer.sae.b_enc.data[7] = -1e3
        for batch in activations[64:].split(64)[:10]:
            trainer.step(batch)
    kept, decayed = (
        trainer.optimizer.state[trainer.sae.W_dec]["exp_avg"][7].detach().clone() for trainer in (ours, theirs)
    )
    torch.testing.assert_close(kept, decayed, rtol=1e-4, atol=1e-9)  # what is due is made good later
    for group in theirs.optimizer.param_groups:
        group["silent_moments"] = "keep"
    theirs.step(activations[:64])
    torch.testing.assert_close(
        theirs.optimizer.state[theirs.sae.W_dec]["exp_avg"][7], 0.9**10 * kept, rtol=1e-3, atol=1e-9
    )
    ours.step(activations[:64])
    torch.testing.assert_close(ours.optimizer.state[ours.sae.W_dec]["exp_avg"][7], kept, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_folded_sae_of_whitening_is_the_whole_pipeline_on_raw_activations(architecture, activations):
    compared = 0

    def check(sae, method):
        scaler = method.trainer.activation_scaler
        inner = copy.deepcopy(sae).eval()
        through = scaler.unscale(inner.decode(inner.encode(scaler.scale(activations))))
        raw = folded(sae, method.trainer).eval()
        torch.testing.assert_close(raw(activations), through, rtol=1e-4, atol=1e-4)
        assert raw.cfg.normalize_activations == "none"

    class Checked(Whitening):
        def between(self, step):
            nonlocal compared
            if 0 < step < TRAINING.steps:
                check(self.sae, self)
                compared += 1

    cell = rival_cell("whitening", replace(CELL, architecture=architecture))
    sae, _ = rival_trainers.train_with(Checked, Run(cell, TRAINING, activations, 0.0), None)
    assert compared == TRAINING.steps - 1
    assert sae.cfg.normalize_activations == "none"


@NEEDS_SPARSIFY
def test_an_sae_of_sparsifys_is_the_coder_that_it_was(activations):
    made: list[Any] = []
    stock = rival_sparsify.as_saelens

    def as_saelens(coder):
        made.append((copy.deepcopy(coder), stock(coder)))
        return made[-1][1]

    with mock.patch.object(rival_sparsify, "as_saelens", as_saelens):
        sae, _ = train_rival("signum_multi_topk", CELL, TRAINING, activations, lambda n_tokens, sae: None)
    assert made[-1][1] is sae
    for coder, converted in made:
        with torch.no_grad():
            top_acts, top_indices, _ = coder.encode(activations)
            own = coder.decode(top_acts, top_indices)
        torch.testing.assert_close(converted(activations), own, rtol=1e-5, atol=1e-5)


def test_sparsifys_rate_is_its_own_at_the_rate_of_a_cell():
    assert rival_sparsify.sparsify_lr(2**14) == 5e-3
    assert rival_sparsify.sparsify_lr(2**16) == 2.5e-3
    assert rival_sparsify.sparsify_lr(2**16, lr=2e-3) == 5e-3
    assert RIVALS["signum_multi_topk"].changes == {}


def test_without_sparsify_its_rival_says_how_to_install_it(activations):
    with (
        mock.patch.dict("sys.modules", {"schedulefree": None}),
        pytest.raises(ImportError, match=r"pip install --no-deps eai-sparsify==1\.3\.3"),
    ):
        train_rival("signum_multi_topk", CELL, TRAINING, activations)
