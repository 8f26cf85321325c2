"""Initialization, training, resume, files and reading of a Lorsa."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saelens_asi.lorsa import (
    CachedSequences,
    Lorsa,
    LorsaConfig,
    LorsaInit,
    LorsaTraining,
    ModelSequences,
    RotaryPositions,
    batches,
    import_llamascopium,
    initialize_lorsa_,
    load_lorsa,
    lorsa_metrics,
    read_attention,
    read_feature,
    read_history,
    save_lorsa,
    token_windows,
    top_contexts,
    train_lorsa,
)
from saelens_asi.lorsa.read import firing_rates, words_of
from saelens_asi.lorsa.run import TrainingRun, batch_index
from saelens_asi.plots import plot_reading
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum
from tests.helpers import tiny, tiny_attention

LAYER, N_OV, K = 1, 64, 4


def made(model: Any, data: CachedSequences, **settings: Any) -> Lorsa:
    lorsa = Lorsa.from_attention(model, LAYER, n_ov_heads=N_OV, k=K)
    settings = {"d_init": 4, "n_tokens": 64 * (tiny_attention.N_CTX - 1), **settings}
    initialize_lorsa_(lorsa, read_attention(model, LAYER), batches(data, 8), LorsaInit(**settings))
    return lorsa


def test_cached_and_model_sequences_are_the_same(model: Any, data: CachedSequences, tmp_path: Path) -> None:
    live = ModelSequences(model, LAYER, tiny_attention.tokens(64))
    index = torch.tensor([3, 60, 17])
    assert (live.n_sequences, live.n_positions) == (data.n_sequences, data.n_positions) == (64, tiny_attention.N_CTX)
    for a, b in zip(live.batch(index), data.batch(index), strict=True):
        torch.testing.assert_close(a, b)
    loaded = CachedSequences.load(data.save(tmp_path / "sequences.safetensors"))
    assert torch.equal(loaded.x, data.x)
    assert torch.equal(loaded.tokens, data.tokens)
    save_file({"x": data.x}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold cached sequences"):
        CachedSequences.load(tmp_path / "other.safetensors")


def test_tensors_read_back_lie_in_torchs_own_memory(model: Any, data: CachedSequences, tmp_path: Path) -> None:
    loaded = CachedSequences.load(data.save(tmp_path / "sequences.safetensors"))
    saved = load_lorsa(save_lorsa(made(model, data), tmp_path / "lorsa"))
    llamascopium_folder(tmp_path / "llamascopium")
    imported = import_llamascopium(tmp_path / "llamascopium")
    settings = LorsaTraining(steps=2, lr_warm_up_steps=0, checkpoint_every=2)
    train_lorsa(made(model, data), data, settings, out=tmp_path / "run", progress=False)
    run = TrainingRun(made(model, data), settings, data, tmp_path / "run")
    run.restore()
    moments = [value for state in run.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert run.done == 2
    assert moments
    weights = [tensor for lorsa in (saved, imported, run.lorsa) for tensor in lorsa.state_dict().values()]
    for tensor in (loaded.x, loaded.y, loaded.tokens, run.silent, *weights, *moments):
        assert tensor.data_ptr() % 64 == 0


def test_token_windows_start_with_bos_and_lose_nothing() -> None:
    rows = [{"text": "w3 w4 w5"}, {"text": "w6 w7"}, {"text": "w8 w9 w10"}]
    windows = token_windows(rows, tiny.tokenizer(), 5)
    assert windows.tolist() == [[0, 3, 4, 5, 6], [0, 7, 8, 9, 10]]
    assert token_windows([{"tokens": list(range(3, 9))}], tiny.tokenizer(), 4, 2).tolist() == [
        [0, 3, 4, 5],
        [0, 6, 7, 8],
    ]
    with pytest.raises(ValueError, match="gives 2 windows of 5 positions, fewer than 3"):
        token_windows(rows, tiny.tokenizer(), 5, 3)
    with pytest.raises(ValueError, match="column 'text'"):
        token_windows([{"words": "w3"}], tiny.tokenizer(), 5)


def test_per_head_features_read_the_projection_of_their_heads_output(model: Any, data: CachedSequences) -> None:
    target = read_attention(model, LAYER)
    lorsa = made(model, data, balance=0.0)
    x, y = data.batch(torch.arange(64))
    with torch.no_grad():
        exact = Lorsa.exact(target)
        pattern = exact.scores(x.shape[1], x.shape[1]).pattern(*exact.queries_and_keys(x))
        z = pattern @ exact.values(x)
        pre = lorsa.pre_activations(pattern, x)
    per_head = N_OV // target.n_heads
    for head in range(target.n_heads):
        output = z[:, head] @ target.W_O[head]
        own = Spectrum.from_moments(RunningMoments.zeros(target.d_model).update_(output[:, 1:]))
        basis = own.principal_directions(4).float()
        rows = slice(head * per_head, (head + 1) * per_head)
        inside = lorsa.W_O[rows] @ basis @ basis.T
        torch.testing.assert_close(inside, lorsa.W_O[rows].detach(), rtol=1e-3, atol=1e-4)
        projected = (output - own.mean).float() @ lorsa.W_O[rows].T
        ratio = pre[..., rows] / projected
        assert ratio.median() > 0
        torch.testing.assert_close(
            pre[..., rows], projected * ratio.median(), rtol=1e-2, atol=1e-3 * float(pre[..., rows].abs().max())
        )
    torch.testing.assert_close(
        pre[:, 1:].mean(dim=(0, 1)), torch.zeros(N_OV), rtol=0, atol=1e-3 * float(pre.abs().max())
    )
    torch.testing.assert_close(lorsa.b_D.detach(), y[:, 1:].mean(dim=(0, 1)), rtol=1e-4, atol=1e-5)


def test_active_puts_w_o_into_the_active_subspace_and_random_does_not(model: Any, data: CachedSequences) -> None:
    basis = Spectrum.from_moments(RunningMoments.zeros(16).update_(data.y[:, 1:])).principal_directions(4).float()
    share = {}
    for method in ("active", "random"):
        lorsa = made(model, data, method=method, norm=0.5, center="zeros", value_share=1.0)
        directions = lorsa.W_O.detach()
        share[method] = float((directions @ basis).square().sum() / directions.square().sum())
        torch.testing.assert_close(lorsa.W_O.norm(dim=1), torch.full((N_OV,), 0.5))
        torch.testing.assert_close(lorsa.W_V.norm(dim=1), torch.full((N_OV,), 0.5))
        assert not lorsa.b_D.any()
        assert not lorsa.mean_read.any()
    assert share["active"] == pytest.approx(1, abs=1e-5)
    assert share["random"] < 0.5


def test_least_squares_norm_has_the_lowest_initial_error(model: Any, data: CachedSequences) -> None:
    best = lorsa_metrics(made(model, data), batches(data, 8)).nmse
    for factor in (0.9, 1.1):
        lorsa = made(model, data)
        with torch.no_grad():
            lorsa.W_O *= factor
        assert lorsa_metrics(lorsa, batches(data, 8)).nmse > best
    lorsa = made(model, data, method="active", norm="matched")
    with torch.no_grad():
        energy = (lorsa(data.x) - lorsa.b_D)[:, 1:].square().sum() / (data.y - lorsa.b_D)[:, 1:].square().sum()
    assert float(energy) == pytest.approx(1, rel=1e-4)


def test_value_share_moves_scale_from_w_o_to_w_v_at_the_same_output(model: Any, data: CachedSequences) -> None:
    even, shared = (made(model, data, value_share=share) for share in (1.0, 9.0))
    torch.testing.assert_close(shared(data.x), even(data.x), rtol=1e-4, atol=1e-5)
    rms = [[float(w.detach().norm()) for w in (lorsa.W_V, lorsa.W_O)] for lorsa in (even, shared)]
    assert rms[0][0] == pytest.approx(rms[0][1])
    assert rms[1][0] == pytest.approx(9 * rms[1][1])


def test_balance_evens_out_the_pre_activations(model: Any, data: CachedSequences) -> None:
    spread = []
    for balance in (0.0, 1.0):
        lorsa = made(model, data, balance=balance)
        with torch.no_grad():
            pattern = lorsa.scores(data.n_positions, data.n_positions).pattern(*lorsa.queries_and_keys(data.x))
            deviation = lorsa.pre_activations(pattern, data.x)[:, 1:].flatten(0, 1).std(dim=0)
        spread.append(float(deviation.std() / deviation.mean()))
    assert spread[1] < 1e-3 < 0.2 < spread[0]


def test_initialization_is_recorded_and_done_once(model: Any, data: CachedSequences) -> None:
    lorsa = made(model, data)
    record = lorsa.provenance["initialization"]
    assert record["settings"]["method"] == "per_head"
    assert record["d_init"] == [4] * 4
    assert record["initial_nmse"] == pytest.approx(lorsa_metrics(lorsa, batches(data, 8)).nmse, rel=0.02)
    with pytest.raises(ValueError, match="not fresh"):
        initialize_lorsa_(lorsa, read_attention(model, LAYER), batches(data, 8), LorsaInit(d_init=4))


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_training_lowers_the_error_and_writes_its_history(
    optimizer: Any, model: Any, data: CachedSequences, tmp_path: Path
) -> None:
    lorsa = made(model, data)
    before = lorsa_metrics(lorsa, batches(data, 8))
    settings = LorsaTraining(steps=60, lr=3e-3, lr_warm_up_steps=5, lr_decay_steps=10, optimizer=optimizer)
    history = train_lorsa(lorsa, data, settings, out=tmp_path, progress=False)
    after = lorsa_metrics(lorsa, batches(data, 8))
    assert after.nmse < 0.8 * before.nmse
    assert after.n_tokens == 64 * (tiny_attention.N_CTX - 1)
    assert after.l0 <= K
    assert history == read_history(tmp_path)
    assert [record["step"] for record in history] == [10, 20, 30, 40, 50, 60]
    assert history[-1]["n_tokens"] == 60 * 8 * tiny_attention.N_CTX
    assert history[-1]["lr"] == pytest.approx(3e-4)
    loaded = load_lorsa(tmp_path)
    torch.testing.assert_close(loaded(data.x), lorsa(data.x), rtol=0, atol=0)
    assert loaded.provenance == json.loads(json.dumps(lorsa.provenance))
    assert loaded.provenance["layer"] == LAYER
    assert loaded.provenance["training"]["steps"] == 60


def test_sparse_adam_leaves_silent_features_alone(model: Any, data: CachedSequences) -> None:
    lorsa = made(model, data, balance=0.0)
    with torch.no_grad():
        lorsa.b_V[:5] -= 1e6  # silent
    before = {name: param.detach().clone() for name, param in lorsa.named_parameters()}
    train_lorsa(lorsa, data, LorsaTraining(steps=5, lr_warm_up_steps=0), progress=False)
    for name in ("W_V", "W_O", "b_V"):
        moved = (getattr(lorsa, name) != before[name]).reshape(N_OV, -1).any(dim=1)
        assert not moved[:5].any()
        assert moved[5:].any()
    assert not torch.equal(lorsa.W_Q, before["W_Q"])
    frozen = made(model, data)
    train_lorsa(frozen, data, LorsaTraining(steps=3, lr_warm_up_steps=0, train_qk=False), progress=False)
    assert torch.equal(frozen.W_Q, before["W_Q"])


def test_each_epoch_sees_every_sequence_once() -> None:
    settings = LorsaTraining(steps=100, batch_size=8)
    for epoch in range(3):
        seen = torch.cat([batch_index(epoch * 4 + step, settings, 32) for step in range(4)])
        assert sorted(seen.tolist()) == list(range(32))


def test_readings_add_up(model: Any, data: CachedSequences) -> None:
    lorsa = made(model, data)
    rates = firing_rates(lorsa, data)
    feature = int(rates.argmax())
    contexts = top_contexts(lorsa, data, [feature], n=5)[feature]
    activations = [context.activation for context in contexts]
    assert len(contexts) == 5
    assert activations == sorted(activations, reverse=True)
    with torch.no_grad():
        dense = lorsa.encode(data.x).to_dense(N_OV).view(64, -1, N_OV)
    assert activations[0] == pytest.approx(float(dense[:, 1:, feature].max()))
    assert float(rates[feature]) == pytest.approx(float((dense[:, 1:, feature] != 0).float().mean()))
    best = contexts[0]
    reading = read_feature(lorsa, data, feature, best.sequence, best.position)
    assert reading.context.activation == pytest.approx(best.activation, rel=1e-4)
    assert float(reading.contributions.sum()) == pytest.approx(best.activation, rel=1e-4)
    assert float(reading.pattern.sum()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(
        (reading.keys @ reading.query / 8**0.5).softmax(0), reading.pattern, rtol=1e-4, atol=1e-6
    )
    assert reading.contributions.shape == (best.position + 1,)
    words = words_of(data.tokens[best.sequence], tiny.tokenizer().decode)
    figure = plot_reading(reading, words)
    assert [len(axis.patches) for axis in figure.axes] == [best.position + 1] * 3
    assert str(feature) in figure.axes[0].get_title()
    for wrong, reason in (((N_OV, 0, 0), "feature=64"), ((0, 64, 0), "sequence=64"), ((0, 0, 24), "position=24")):
        with pytest.raises(ValueError, match=f"{reason} does not exist"):
            read_feature(lorsa, data, *wrong)
    with pytest.raises(ValueError, match="words for"):
        plot_reading(reading, words[:1])


def llamascopium_folder(folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A folder as llamascopium's ``save_pretrained`` and ``save_hyperparameters`` write it."""
    cfg = {
        "sae_type": "lorsa",
        "d_model": 8,
        "expansion_factor": 3.0,
        "use_decoder_bias": True,
        "act_fn": "topk",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 4,
        "device": "cpu",
        "dtype": "torch.float32",
        "hook_point_in": "blocks.3.ln1.hook_normalized",
        "hook_point_out": "blocks.3.hook_attn_out",
        "n_qk_heads": 2,
        "d_qk_head": 4,
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "rotary_base": 100,
        "rotary_adjacent_pairs": False,
        "rotary_scale": 1,
        "use_NTK_by_parts_rope": False,
        "n_ctx": 16,
        "attn_scale": 2.0,
        "use_post_qk_ln": True,
        "normalization_type": "RMS",
        "eps": 1e-6,
        **changes,
    }
    shapes = {"W_Q": (2, 8, 4), "W_K": (2, 8, 4), "b_Q": (2, 4), "b_K": (2, 4), "W_V": (24, 8), "W_O": (24, 8)}
    shapes |= {"b_V": (24,), "b_D": (8,), "ln_q.w": (2, 4), "ln_k.w": (2, 4)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {"mask": torch.ones(16, 16).tril().bool(), "IGNORE": torch.tensor(-torch.inf)}
    tensors["dataset_average_activation_norm.blocks.3.ln1.hook_normalized"] = torch.tensor(5.0)
    tensors["dataset_average_activation_norm.blocks.3.hook_attn_out"] = torch.tensor(0.7)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(tensors, folder / "sae_weights.safetensors")
    return cfg, tensors


def llamascopium_forward(cfg: dict[str, Any], w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Their definition: norm the input, select by pre-activation times decoder norm, scale the output back."""
    x = x * math.sqrt(8) / 5.0
    rotary = RotaryPositions(dim=4, base=100.0)
    from saelens_asi.lorsa.positions import rotary_table, rotate

    table = rotary_table(rotary, x.shape[1])
    pre = []
    for head in range(2):
        q, k = (x @ w[f"W_{n}"][head] + w[f"b_{n}"][head] for n in "QK")
        q, k = (
            rotate(t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"ln_{n}.w"][head], *table, False)
            for n, t in (("q", q), ("k", k))
        )
        visible = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        pattern = (q @ k.mT / cfg["attn_scale"]).masked_fill(~visible, -torch.inf).softmax(-1)
        rows = slice(head * 12, head * 12 + 12)
        pre.append(pattern @ (x @ w["W_V"][rows].T + w["b_V"][rows]))
    gated = torch.cat(pre, dim=-1) * w["W_O"].norm(dim=1)
    selected = (gated >= gated.topk(4, dim=-1).values[..., -1:]) & (gated > 0)
    acts = gated * selected / w["W_O"].norm(dim=1)
    return (acts @ w["W_O"] + w["b_D"]) * 0.7 / math.sqrt(8)


def test_a_llamascopium_folder_is_imported_with_its_norms_folded_in(tmp_path: Path) -> None:
    cfg, weights = llamascopium_folder(tmp_path)
    lorsa = import_llamascopium(tmp_path)
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1)) * 3
    with torch.no_grad():
        torch.testing.assert_close(lorsa(x), llamascopium_forward(cfg, weights, x), rtol=1e-4, atol=1e-5)
    assert load_lorsa(save_lorsa(lorsa, tmp_path / "ours")).cfg == lorsa.cfg
    with pytest.raises(ValueError, match="use import_llamascopium"):
        load_lorsa(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"act_fn": "jumprelu"}, "act_fn='jumprelu'"),
        ({"norm_activation": "token-wise"}, "norm_activation='token-wise'"),
        ({"sae_type": "sae"}, "sae_type='sae'"),
        ({"rotary_scale": 2}, "rotary_scale=2"),
        ({"skip_bos": True}, r"does not know: \['skip_bos'\]"),
        ({"normalization_type": "LN"}, "normalization_type='LN'"),
        ({"hook_point_in": "elsewhere"}, "needs the average norms"),
        ({"n_qk_heads": 4}, r"W_Q: \(2, 8, 4\) instead of \(4, 8, 4\)"),
    ],
)
def test_what_an_import_does_not_know_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    llamascopium_folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=reason):
        import_llamascopium(tmp_path)


SHAPE = {"d_model": 8, "n_qk_heads": 3, "n_ov_heads": 12, "d_qk": 4, "k": 2, "n_ctx": 8}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_ov_heads": 14}, "n_ov_heads=14 must be divisible by n_qk_heads=3.*give 12 or 15"),
        ({"k": 13}, "k=13 exceeds n_ov_heads=12"),
        ({"k": 0}, "k=0 must be a positive integer"),
        ({"positions": "rotary"}, "goes with rotary="),
        ({"activation": "relu"}, "activation='relu' must be one of"),
        ({"window": 0}, "window=0 must be positive"),
        ({"skip_positions": 8}, "skip_positions=8"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LorsaConfig(**{**SHAPE, **changes})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "heads"}, "method='heads' must be one of"),
        ({"method": "active"}, "norm='least_squares' needs an encoder tied"),
        ({"norm": "unit"}, "norm='unit' must be a positive number"),
        ({"center": "median"}, "center='median'"),
        ({"d_init": 0}, "d_init=0"),
        ({"balance": 2.0}, "balance=2.0"),
        ({"value_share": 0.0}, "value_share=0.0"),
    ],
)
def test_an_initialization_that_cannot_be_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LorsaInit(**settings)


def test_training_that_cannot_be_is_refused(model: Any, data: CachedSequences) -> None:
    for settings, reason in (
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"lr_warm_up_steps": 8, "lr_decay_steps": 8}, "exceed steps=10"),
        ({"k_start": 9}, "go together"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes=-1.0 must be a number of at least 0"),
        ({"checkpoint_minutes": math.nan}, "checkpoint_minutes=nan"),
        ({"max_skipped_fraction": 1.5}, "max_skipped_fraction=1.5 must lie in"),
    ):
        with pytest.raises(ValueError, match=reason):
            LorsaTraining(**{"steps": 10, "lr_warm_up_steps": 0, **settings})
    fine = LorsaTraining(steps=2, lr_warm_up_steps=0)
    short = Lorsa.from_attention(model, LAYER, n_ov_heads=N_OV, k=K, n_ctx=16)
    with pytest.raises(ValueError, match="sequences of 24 positions exceed n_ctx=16"):
        train_lorsa(short, data, fine, progress=False)
    with pytest.raises(ValueError, match="exceeds the 64 sequences"):
        train_lorsa(made(model, data), data, LorsaTraining(steps=2, batch_size=65, lr_warm_up_steps=0), progress=False)
    with pytest.raises(ValueError, match="need out="):
        train_lorsa(made(model, data), data, fine, resume=True, progress=False)
    with pytest.raises(ValueError, match="the batches hold only"):
        made(model, data, n_tokens=10_000)
