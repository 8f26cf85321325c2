"""Training steps on the sparse path against SAELens's own: losses, gradients, statistics, files, fallbacks."""

from __future__ import annotations

import copy
import gc
import logging
import threading
from contextlib import nullcontext
from itertools import islice
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import Tensor

from saelens_asi import ActiveSubspaceInit
from saelens_asi.plugin import topk_pass as sparse_topk
from saelens_asi.plugin.sparse_steps import SparseSteps, feature_row_groups
from saelens_asi.plugin.topk_pass import dense_path_reason, encoder_of, sparse_pass
from saelens_asi.sparse.rows import Workspace, row_norms, shared_workspace
from saelens_asi.sparse.screens import AdaptiveScreen
from saelens_asi.sparse_adam import SparseAdam
from tests.helpers import tiny

D_SAE, BATCH = 300, 24
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "abstopk": ("abstopk", {}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka_batchtopk", {"matryoshka_widths": [20, 90, D_SAE]}),
    "matryoshka with its own auxiliary loss": (
        "matryoshka_batchtopk",
        {"matryoshka_widths": [20, 90, D_SAE], "use_matryoshka_aux_loss": True},
    ),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def _sae(variant: str, dtype: str = "float64", **changes: Any) -> Any:
    architecture, options = VARIANTS[variant]
    torch.manual_seed(1)
    sae = tiny.training_sae(architecture, **{"d_sae": D_SAE, "k": 6, "dtype": dtype, **options, **changes})
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
        sae.W_dec.mul_(torch.rand(D_SAE, 1, dtype=sae.dtype) + 0.5)
    return sae


def _input(n_dead: int, dtype: torch.dtype) -> TrainStepInput:
    torch.manual_seed(2)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[torch.randperm(D_SAE)[:n_dead]] = True
    batch = torch.randn(BATCH, tiny.D_MODEL, dtype=dtype)
    return TrainStepInput(
        sae_in=batch, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )


def _sparse(sae: Any, step_input: TrainStepInput) -> tuple[Any, dict[str, Tensor], Tensor]:
    norms = row_norms(sae.W_dec.detach()) if sae.cfg.rescale_acts_by_decoder_norm else None
    done = sparse_pass(sae, step_input, encoder_of(sae, norms), Workspace())
    gradients = done.gradients
    whole = {"W_enc": gradients.W_enc.to_dense(D_SAE, 1), "b_dec": gradients.b_dec}
    whole |= {"b_enc": gradients.b_enc.to_dense(D_SAE), "W_dec": gradients.W_dec.to_dense(D_SAE)}
    return done.output, whole, done.firings


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.usefixtures("both_ways")
@variants
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("n_dead", [0, 3, 200])
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_losses_and_gradients_are_those_of_saelens(variant, rescale, n_dead, apply_b_dec, dtype, tolerance):
    options = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": apply_b_dec}
    sae, twin = _sae(variant, dtype, **options), _sae(variant, dtype, **options)
    step_input = _input(n_dead, sae.dtype)
    output, gradients, firings = _sparse(sae, step_input)
    expected = twin.training_forward_pass(step_input)
    expected.loss.backward()
    for name, param in twin.named_parameters():
        assert _relative_error(gradients[name], param.grad) < tolerance, name
    assert output.losses.keys() == expected.losses.keys()
    for name, loss in expected.losses.items():
        assert _relative_error(output.losses[name], loss.detach()) < tolerance, name
    assert (expected.losses["auxiliary_reconstruction_loss"] > 0) == (n_dead > 0)
    assert _relative_error(output.loss, expected.loss.detach()) < tolerance
    assert _relative_error(output.sae_out, expected.sae_out) < tolerance
    assert _relative_error(output.feature_acts.to_dense(), expected.feature_acts) < tolerance
    assert torch.equal(firings, (expected.feature_acts != 0).sum(dim=0))
    assert output.metrics.keys() == expected.metrics.keys()
    if "topk_threshold" in expected.metrics:
        assert _relative_error(sae.topk_threshold, twin.topk_threshold) < tolerance


@variants
def test_a_coefficient_of_zero_leaves_dead_features_alone(variant):
    sae = _sae(variant, aux_loss_coefficient=0.0)
    step_input = _input(200, sae.dtype)
    output, gradients, firings = _sparse(sae, step_input)
    assert output.losses["auxiliary_reconstruction_loss"] == 0
    assert not gradients["W_dec"][firings == 0].any()


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_normalized_activations(variant, normalize):
    sae, twin = (_sae(variant, normalize_activations=normalize) for _ in range(2))
    step_input = _input(0, sae.dtype)
    output, gradients, _ = _sparse(sae, step_input)
    expected = twin.training_forward_pass(step_input)
    expected.loss.backward()
    assert _relative_error(output.loss, expected.loss.detach()) < 1e-10
    for name, param in twin.named_parameters():
        assert _relative_error(gradients[name], param.grad) < 1e-10, name


@variants
def test_bfloat16_is_at_least_as_close_to_float64_as_saelens(variant):
    exact, sae, twin = _sae(variant), _sae(variant, "bfloat16"), _sae(variant, "bfloat16")
    exact.load_state_dict({name: value.double() for name, value in sae.state_dict().items()})
    step_input, wide = _input(0, torch.bfloat16), _input(0, torch.bfloat16)
    wide.sae_in = wide.sae_in.double()
    _, gradients, _ = _sparse(sae, step_input)
    for other, given in ((twin, step_input), (exact, wide)):
        other.training_forward_pass(given).loss.backward()
    for name, param in exact.named_parameters():
        own = _relative_error(gradients[name].double(), param.grad)
        stock = _relative_error(twin.get_parameter(name).grad.double(), param.grad)
        assert own < max(1.1 * stock, 0.02), name


@variants
def test_autocast_selects_what_saelens_selects(variant):
    sae, twin = _sae(variant, "float32"), _sae(variant, "float32")
    step_input = _input(0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gradients, _ = _sparse(sae, step_input)
        expected = twin.training_forward_pass(step_input)
    expected.loss.backward()
    assert torch.equal(output.feature_acts.to_dense() != 0, expected.feature_acts != 0)
    for name, param in twin.named_parameters():
        assert _relative_error(gradients[name], param.grad) < 0.02, name


def _run(variant: str, sparse: bool, monkeypatch: Any, n_steps: int = 12, **changes: Any) -> Any:
    architecture, options = VARIANTS[variant]
    torch.manual_seed(3)
    settings = {"d_sae": D_SAE, "k": 6, "optimizer": "sparse_adam", "dead_feature_window": 3, "n_steps": n_steps}
    trainer = tiny.trainer(architecture, **{**settings, **options, **changes})
    with monkeypatch.context() as patch:
        if not sparse:
            patch.setattr(SparseSteps, "dense_path_reason", lambda *_: "asked for")
        trainer.fit()
    return trainer


@pytest.mark.usefixtures("both_ways")
@variants
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("optimizer", ["sparse_adam", "adam"])
def test_a_whole_run_ends_where_saelens_steps_end(variant, normalize, optimizer, monkeypatch):
    start = ActiveSubspaceInit(d_init=5, n_tokens=128)
    changes = {"initializer": start, "normalize_activations": normalize, "optimizer": optimizer}
    sparse, dense = (_run(variant, flag, monkeypatch, dtype="float64", **changes) for flag in (True, False))
    for name, param in dense.sae.named_parameters():
        torch.testing.assert_close(sparse.sae.get_parameter(name), param, rtol=1e-6, atol=1e-8)
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(sparse, name), getattr(dense, name)), name
    assert sparse.n_frac_active_samples == dense.n_frac_active_samples
    assert sparse.dead_neurons.any()


def test_weights_in_files_are_contiguous_and_memory_is_put_back(monkeypatch, tmp_path):
    trainer = _run("topk", True, monkeypatch, n_steps=4)
    assert trainer.sae.W_enc.is_contiguous()
    assert not trainer.sae._state_dict_hooks
    for _ in range(2):
        trainer.step(next(tiny.batches()))
    assert not trainer.sae.W_enc.is_contiguous()
    path, _ = trainer.sae.save_model(str(tmp_path))
    assert torch.equal(load_file(path)["W_enc"], trainer.sae.W_enc)
    inference, _ = trainer.sae.save_inference_model(str(tmp_path / "inference"))
    assert load_file(inference)["W_enc"].shape == trainer.sae.W_enc.shape
    again = copy.deepcopy(trainer.sae)
    assert torch.equal(again.state_dict()["W_enc"], trainer.sae.W_enc)


def test_a_decoder_written_to_from_outside_is_noticed():
    trainer = tiny.trainer(d_sae=D_SAE, k=6, optimizer="sparse_adam")
    trainer.step(next(tiny.batches()))
    trainer.sae.W_dec.data *= 2
    norms = trainer._sparse_steps.current_decoder_norms(trainer.sae)
    torch.testing.assert_close(norms, trainer.sae.W_dec.detach().norm(dim=1))


def _trainer_after_a_step(**settings: Any) -> Any:
    trainer = tiny.trainer(d_sae=D_SAE, k=6, optimizer="sparse_adam", **settings)
    trainer.step(next(tiny.batches()))
    return trainer


def _norms_of_next_step(trainer: Any, monkeypatch: Any) -> Tensor:
    """The norms that the next step ranks features by."""
    seen = []

    def watched(sae: Any, norms: Tensor) -> Any:
        seen.append(norms.clone())
        return encoder_of(sae, norms)

    with monkeypatch.context() as patch:
        patch.setattr("saelens_asi.plugin.sparse_steps.encoder_of", watched)
        trainer.step(next(tiny.batches()))
    return seen[0]


def _under_no_grad(trainer: Any, rows: Tensor) -> None:
    with torch.no_grad():
        trainer.sae.W_dec[rows] *= 3


def _through_data_and_said(trainer: Any, rows: Tensor) -> None:
    trainer.sae.W_dec.data[rows] *= 3
    trainer.invalidate_caches()
    assert trainer._sparse_steps.screen is None


def _other_memory(trainer: Any, rows: Tensor) -> None:
    trainer.sae.W_dec.data = trainer.sae.W_dec.data.index_fill(0, rows, 3.0)


def _after_the_optimizer(trainer: Any, rows: Tensor) -> None:
    def project(*_: Any) -> None:
        with torch.no_grad():
            trainer.sae.W_dec[rows] *= 3

    handle = trainer.optimizer.register_step_post_hook(project)
    trainer.step(next(tiny.batches()))
    handle.remove()


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("write", [_under_no_grad, _through_data_and_said, _other_memory, _after_the_optimizer])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_the_decoder_that_somebody_writes_to_are_seen_in_the_very_next_step(write, dtype, monkeypatch):
    trainer = _trainer_after_a_step(dtype=dtype)
    write(trainer, torch.tensor([1, 130, 299]))
    expected = row_norms(trainer.sae.W_dec.detach())
    assert torch.equal(_norms_of_next_step(trainer, monkeypatch), expected)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("row", [0, 7, 151, 299])
def test_a_row_of_the_decoder_that_is_written_past_torchs_notice_is_seen_within_32_steps(row):
    trainer = _trainer_after_a_step(n_steps=100)
    steps = trainer._sparse_steps
    trainer.sae.W_dec.data[row] *= 1.001
    for _ in range(32):
        steps.current_decoder_norms(trainer.sae)
    assert torch.equal(steps.decoder_norms, row_norms(trainer.sae.W_dec.detach()))


@pytest.mark.usefixtures("both_ways")
def test_norms_that_nobody_disturbs_are_computed_once(monkeypatch):
    whole = []

    def counted(table: Tensor) -> Tensor:
        whole.extend([1] * (table.shape[0] == D_SAE))
        return row_norms(table)

    monkeypatch.setattr("saelens_asi.plugin.sparse_steps.row_norms", counted)
    trainer = _trainer_after_a_step(n_steps=80)
    for batch in islice(tiny.batches(seed=1), 70):
        trainer.step(batch)
    assert len(whole) == 1


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("n_rows", [1, 10, 32])
@pytest.mark.parametrize("shape", [(300, 12), (1000, 576), (33, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_of_a_row_has_the_same_bits_among_any_others(n_rows, shape, dtype):
    table = torch.randn(shape).to(dtype)
    whole = row_norms(table)
    for first in (0, 1, shape[0] - n_rows):
        assert torch.equal(row_norms(table[first : first + n_rows]), whole[first : first + n_rows])


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("optimizer", ["sparse_adam", "adam"])
def test_trainers_that_step_in_turn_share_memory_and_end_where_they_would_alone(optimizer, monkeypatch):
    def make(seed: int, d_sae: int) -> Any:
        torch.manual_seed(seed)
        return tiny.trainer(d_sae=d_sae, k=6, optimizer=optimizer, initializer=ActiveSubspaceInit(d_init=5, norm=0.3))

    widths = (D_SAE, 200)
    alone, together = ([make(seed, d_sae) for seed, d_sae in enumerate(widths)] for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr("saelens_asi.plugin.sparse_steps.shared_workspace", Workspace)  # a new one in each step
        for trainer in alone:
            for batch in islice(tiny.batches(), 6):
                trainer.step(batch)
    gc.collect()  # trainers of other tests
    assert shared_workspace().n_bytes() == 0
    for batch in islice(tiny.batches(), 6):
        for trainer in together:
            trainer.step(batch)
    first, second = (trainer._sparse_steps for trainer in together)
    assert first._workspace is second._workspace is shared_workspace()
    for one, other in zip(alone, together, strict=True):
        for name, param in one.sae.named_parameters():
            assert torch.equal(param, other.sae.get_parameter(name)), name
    both = shared_workspace().n_bytes()
    second.finish()
    assert shared_workspace().n_bytes() == both
    first.finish()
    assert shared_workspace().n_bytes() == 0  # the last one that held it has let go
    for batch in islice(tiny.batches(), 6):
        together[0].step(batch)
    assert both < 1.2 * shared_workspace().n_bytes()  # two need what the wider one needs alone


def test_threads_do_not_share_a_workspace():
    own, found = shared_workspace(), []
    thread = threading.Thread(target=lambda: found.append(shared_workspace()))
    thread.start()
    thread.join()
    assert found[0] is not own
    assert shared_workspace() is own


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("of", [torch.optim.Adam, SparseAdam])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_clipping_is_that_of_torch_in_float64(of, scale):
    sae, twin = _sae("topk"), _sae("topk")
    step_input = _input(0, sae.dtype)
    step_input.sae_in *= scale
    own = SparseAdam(feature_row_groups(sae)) if of is SparseAdam else torch.optim.Adam(sae.parameters())
    SparseSteps().take(sae, own, step_input.sae_in, lambda: step_input, nullcontext())
    twin.training_forward_pass(step_input).loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    for name, param in twin.named_parameters():
        moment = own.state[sae.get_parameter(name)]["exp_avg"] / 0.1
        assert _relative_error(moment, param.grad) < 1e-12, name


@pytest.mark.usefixtures("both_ways")
def test_norms_follow_the_decoder_from_step_to_step():
    trainer = tiny.trainer(d_sae=D_SAE, k=6, optimizer="sparse_adam")
    trainer.step(next(tiny.batches()))
    torch.testing.assert_close(
        trainer._sparse_steps.decoder_norms, trainer.sae.W_dec.detach().norm(dim=1), rtol=1e-6, atol=0
    )


def test_a_loss_of_the_callers_own_is_kept():
    sae, twin = _sae("topk"), _sae("topk")
    sae.mse_loss_fn = twin.mse_loss_fn = lambda predicted, target: (predicted - target).pow(4)
    step_input = _input(0, sae.dtype)
    output, gradients, _ = _sparse(sae, step_input)
    expected = twin.training_forward_pass(step_input)
    expected.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss.detach())
    torch.testing.assert_close(gradients["W_dec"], twin.W_dec.grad)


def test_no_gradient_of_full_size_is_ever_made(monkeypatch):
    trainer = tiny.trainer(d_sae=D_SAE, k=2, optimizer="sparse_adam")
    seen = []
    stock_step = trainer.optimizer.step

    def step(*args: Any) -> Any:
        grads = {name: param.grad for name, param in trainer.sae.named_parameters()}
        seen.append([name for name, grad in grads.items() if grad is not None])
        assert all(len(gradient.rows) < D_SAE for gradient in trainer.optimizer.row_gradients.values())
        return stock_step(*args)

    trainer.optimizer.step = step
    trainer.step(next(tiny.batches()))
    assert seen == [["b_dec"]]
    assert not trainer.optimizer.row_gradients  # forgotten, as gradients are


def test_the_encoder_is_built_once_a_step(monkeypatch):
    built = []

    def counted(*args: Any) -> Any:
        built.append(encoder_of(*args))
        return built[-1]

    monkeypatch.setattr("saelens_asi.plugin.sparse_steps.encoder_of", counted)
    trainer = tiny.trainer(d_sae=D_SAE, k=6, optimizer="sparse_adam")
    for n_steps in (1, 2, 3):
        trainer.step(next(tiny.batches()))
        assert len(built) == n_steps


def test_the_encoder_of_a_step_shows_the_weights_that_the_step_has_moved(monkeypatch):
    shown = []

    class Watched(AdaptiveScreen):
        def rows_changed(self, encoder: Any, rows: Tensor) -> None:
            shown.append((encoder.rows.clone(), encoder.bias.clone(), encoder.scale.clone(), rows))
            super().rows_changed(encoder, rows)

    monkeypatch.setattr("saelens_asi.plugin.sparse_steps.AdaptiveScreen", Watched)
    trainer = tiny.trainer(d_sae=D_SAE, k=6, optimizer="sparse_adam")
    before = trainer.sae.W_enc.detach().t().clone()
    trainer.step(next(tiny.batches()))
    rows, bias, scale, moved = shown[0]
    assert torch.equal(rows, trainer.sae.W_enc.t())
    assert torch.equal(bias, trainer.sae.b_enc)
    torch.testing.assert_close(scale, trainer.sae.W_dec.detach().norm(dim=1), rtol=1e-6, atol=0)
    assert set((rows != before).any(dim=1).nonzero().flatten().tolist()) <= set(moved.tolist())


@pytest.mark.parametrize(
    ("architecture", "make_optimizer", "reason"),
    [
        ("topk", lambda sae: torch.optim.SGD(sae.parameters(), lr=0.1), "no sparse step for SGD"),
        ("standard", lambda sae: torch.optim.Adam(sae.parameters()), "only TopK architectures are sparse"),
    ],
)
def test_a_step_that_is_not_taken_says_why_and_changes_nothing(architecture, make_optimizer, reason):
    sae = tiny.training_sae(architecture)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    batch = next(tiny.batches())
    steps = SparseSteps()
    assert steps.take(sae, make_optimizer(sae), batch, _never_called, nullcontext()) == reason
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def _never_called() -> TrainStepInput:
    raise AssertionError("no input is made for a step that is not taken")


def test_a_step_carries_the_norm_of_its_gradients_before_clipping():
    sae, twin = _sae("topk"), _sae("topk")
    step_input = _input(0, sae.dtype)
    optimizer = torch.optim.Adam(sae.parameters())
    step = SparseSteps().take(sae, optimizer, step_input.sae_in, lambda: step_input, nullcontext())
    twin.training_forward_pass(step_input).loss.backward()
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    torch.testing.assert_close(step.gradient_norm, expected)
    assert torch.equal(step.firings, (step.output.feature_acts.to_dense() != 0).sum(dim=0))


class _OwnStep(SAETrainer):
    def _train_step(self, sae: Any, sae_in: Tensor) -> Any:
        self.own_steps = getattr(self, "own_steps", 0) + 1
        return super()._train_step(sae, sae_in)


def test_a_trainer_with_a_step_of_its_own_keeps_it(caplog):
    trainer = tiny.trainer(optimizer="sparse_adam", trainer_class=_OwnStep)
    trainer.step(next(tiny.batches()))
    assert trainer.own_steps == 1
    assert "_train_step of its own" in caplog.text


def _hook(sae: Any) -> None:
    sae.hook_sae_acts_post.register_forward_hook(lambda *_: None)


def _compiled(sae: Any) -> None:
    sae.training_forward_pass = sae.training_forward_pass


def _frozen(sae: Any) -> None:
    sae.b_enc.requires_grad_(False)


def _watched(sae: Any) -> None:
    sae.W_dec.register_hook(lambda grad: grad)


@pytest.mark.parametrize("change", [_hook, _compiled, _frozen, _watched])
def test_what_needs_the_dense_path_gets_it_and_is_told_once(change, caplog):
    trainer = tiny.trainer(d_sae=D_SAE, k=6, optimizer="sparse_adam")
    change(trainer.sae)
    with caplog.at_level(logging.WARNING):
        outputs = [trainer.step(next(tiny.batches())) for _ in range(3)]
    assert not outputs[0].feature_acts.is_sparse
    assert caplog.text.count("dense path") == 1


def test_a_class_patched_by_someone_else_is_left_to_them(monkeypatch):
    sae = _sae("topk")
    assert dense_path_reason(sae, torch.zeros(2, tiny.D_MODEL)) is None
    monkeypatch.setattr(type(sae), "decode", lambda self, acts: acts)
    assert "decode" in dense_path_reason(sae, torch.zeros(2, tiny.D_MODEL))


def test_a_subclass_is_left_to_its_author():
    class Own(sparse_topk.TopKTrainingSAE):
        pass

    sae = _sae("topk")
    sae.__class__ = Own
    assert "Own" in dense_path_reason(sae, torch.zeros(2, tiny.D_MODEL))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@variants
@pytest.mark.parametrize("n_dead", [0, 200])
def test_a_gpu_finds_the_gradients_of_the_cpu(variant, n_dead):
    sae = _sae(variant)
    step_input = _input(n_dead, sae.dtype)
    output, gradients, _ = _sparse(sae, step_input)
    step_input.sae_in, step_input.dead_neuron_mask = step_input.sae_in.cuda(), step_input.dead_neuron_mask.cuda()
    on_gpu, gradients_on_gpu, _ = _sparse(_sae(variant).to("cuda"), step_input)
    assert _relative_error(on_gpu.loss.cpu(), output.loss) < 1e-10
    for name, gradient in gradients.items():
        assert _relative_error(gradients_on_gpu[name].cpu(), gradient) < 1e-10, name
