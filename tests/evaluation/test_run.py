"""asi.evaluate against a slow dense twin, on given activations and on both kinds of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.registry import get_sae_class, get_sae_training_class
from torch import Tensor

import saelens_asi as asi
from saelens_asi.evaluation import reconstruction
from saelens_asi.evaluation.saes import SAESource
from tests.helpers import tiny
from tests.helpers.reference import effective_rank_by_svd

Z, MLP = "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"
SPECIAL = (0, 1, 2)
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening")


def trained(architecture: str = "standard", folder: Path | None = None, **settings: Any) -> Any:
    """A few training steps, then as SAELens saves and loads it where a folder is given."""
    sae = tiny.trainer(architecture, n_steps=4, **settings).fit()
    if hasattr(sae, "b_enc"):
        sae.b_enc.data += 0.3 * torch.randn(sae.cfg.d_sae)
    if folder is None:
        return sae
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


@torch.no_grad()
def dense(sae: Any, x: Tensor) -> dict[str, Any]:
    """All measures from whole matrices, one feature at a time where that is plainer."""
    acts = sae.encode(x)
    acts = acts.to_dense() if acts.is_sparse else acts
    error = (x - sae.decode(acts)).double().square().sum(dim=1).mean()
    variance = (x - x.double().mean(dim=0)).square().sum(dim=1).mean()
    counts = torch.tensor([int((acts[:, i] != 0).sum()) for i in range(sae.cfg.d_sae)])
    return {
        "n_tokens": len(x),
        "dead_fraction": sum(count == 0 for count in counts.tolist()) / sae.cfg.d_sae,
        "nmse": float(error / variance),
        "explained_variance": float(1 - error / variance),
        "l0": sum(int((row != 0).sum()) for row in acts) / len(x),
        "firing_counts": counts,
        "effective_rank": effective_rank_by_svd(x),
    }


def check(result: asi.SAEEvaluation, expected: dict[str, Any]) -> None:
    assert result.n_tokens == expected["n_tokens"]
    assert torch.equal(result.firing_counts, expected["firing_counts"])
    for name in ("dead_fraction", "nmse", "explained_variance", "l0", "effective_rank"):
        assert getattr(result, name) == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_as_it_is_saved_equals_the_dense_twin(architecture: str, tmp_path: Path) -> None:
    sae, x = trained(architecture, tmp_path), tiny.activations(300)
    result = asi.evaluate(sae, activations=x, progress=False)
    check(result, dense(sae, x))
    assert 0 < result.l0 < sae.cfg.d_sae
    assert result.loss is None
    assert result.hook_name is None


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_training_sae_is_evaluated_as_what_it_is_saved_as(architecture: str, tmp_path: Path) -> None:
    sae, x = trained(architecture), tiny.activations(300)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.train()
    result = asi.evaluate(sae, activations=x.split(7), progress=False)
    sae.save_inference_model(tmp_path)
    check(result, dense(SAE.load_from_disk(tmp_path), x))
    assert sae.training
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_normalizations_are_those_of_inference(normalize: str, tmp_path: Path) -> None:
    sae, x = trained("standard", tmp_path, normalize_activations=normalize), 3 * tiny.activations(300)
    check(asi.evaluate(sae, activations=x, progress=False), dense(sae, x))
    assert {"x_norm_coeff", "ln_mu", "ln_std"}.isdisjoint(vars(sae))


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_a_checkpoint_in_the_middle_of_training_sees_raw_activations(
    architecture: str, normalize: str, tmp_path: Path
) -> None:
    trainer = tiny.trainer(architecture, n_steps=8, normalize_activations=normalize, n_checkpoints=1,
                           checkpoint_path=str(tmp_path))  # fmt: skip
    trainer.fit()
    folder = next(path.parent for path in tmp_path.glob("*/trainer_state.pt"))
    sae = SAESource("checkpoint", folder).load()
    assert sae.cfg.normalize_activations == "none"
    # The same weights, scaled by hand.
    raw = get_sae_training_class(architecture)[0].load_from_disk(folder)
    x = tiny.activations(300)
    scaler = trainer.activation_scaler
    scaler.load(folder / "activation_scaler.json")
    with torch.no_grad():
        if architecture == "batchtopk":
            raw.save_inference_model(tmp_path / "inference")
            raw = SAE.load_from_disk(tmp_path / "inference")
        acts = raw.encode(scaler.scale(x))
        error = (x - scaler.unscale(raw.decode(acts))).square().sum()
    result = asi.evaluate(sae, activations=x, progress=False)
    assert result.nmse == pytest.approx(float(error / (x - x.mean(dim=0)).square().sum()), rel=1e-3)
    assert (result.firing_counts - (acts != 0).sum(dim=0)).abs().sum() <= 3  # at the threshold, rounding decides


def test_a_scale_that_is_not_in_the_weights_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    sae = StandardSAE(StandardSAEConfig(tiny.D_MODEL, 8, normalize_activations="expected_average_only_in"))
    asi.evaluate(sae, activations=tiny.activations(10), progress=False)
    assert "weights do not hold that scale" in caplog.text


def test_other_windows_than_those_of_training_are_warned_of(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    sae, text = trained(), Dataset.from_dict({"text": ["w3 w4 w5 w6 w7 w8"] * 40})

    def warnings(data: Any, **settings: Any) -> str:
        caplog.clear()
        asi.evaluate(sae, model, data, hook_name=MLP, context_size=8, loss_tokens=0, progress=False, **settings)
        return caplog.text

    sae.cfg.metadata.prepend_bos, sae.cfg.metadata.seqpos_slice = True, (None,)
    assert not warnings(text)
    sae.cfg.metadata.prepend_bos, sae.cfg.metadata.seqpos_slice = False, (2, -1)
    assert "prepend_bos=False" in warnings(text)
    assert "prepend_bos" not in warnings(tiny.tokens(8))
    assert "seqpos_slice=(2, -1)" in warnings(tiny.tokens(8))
    assert not warnings(tiny.tokens(8), exclude_positions=(0, 1, -1))
    sae.cfg.metadata.seqpos_slice = [None, None, 2]  # as JSON gives it back
    assert "seqpos_slice" in warnings(tiny.tokens(8))
    sae.cfg.metadata.seqpos_slice = [0, None]
    assert not warnings(tiny.tokens(8))


@pytest.mark.parametrize("split", [1, 7, 300])
@pytest.mark.parametrize("max_values", [48, 500, 2**25])
def test_batches_do_not_matter(split: int, max_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = trained(), tiny.activations(300)
    whole = asi.evaluate(sae, activations=x, progress=False)
    monkeypatch.setattr(reconstruction, "_MAX_DENSE_VALUES", max_values)
    result = asi.evaluate(sae, activations=(part for part in x.split(split)), progress=False)
    assert torch.equal(result.firing_counts, whole.firing_counts)
    assert result.nmse == pytest.approx(whole.nmse, rel=1e-5)
    assert result.effective_rank == pytest.approx(whole.effective_rank, rel=1e-9)


def test_each_activation_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, seen = trained(), []
    stock = type(sae).encode
    monkeypatch.setattr(type(sae), "encode", lambda self, x: seen.append(len(x)) or stock(self, x))
    asi.evaluate(sae, activations=tiny.activations(500), n_tokens=300, progress=False)
    assert sum(seen) == 300


def test_more_tokens_find_fewer_dead_features() -> None:
    sae, x = trained(), tiny.activations(3000)
    results = [asi.evaluate(sae, activations=x, n_tokens=n, progress=False) for n in (2, 30, 3000)]
    assert [result.n_tokens for result in results] == [2, 30, 3000]
    assert results[0].n_dead > results[1].n_dead >= results[2].n_dead


def test_the_record_survives_json() -> None:
    result = asi.evaluate(trained("topk"), activations=tiny.activations(300), progress=False)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    again = asi.SAEEvaluation.from_dict(values, result.firing_counts)
    assert again.to_dict() == result.to_dict()
    histogram = values["firing_rates"]
    assert sum(histogram["features"]) + histogram["never"] == 48
    assert histogram["never"] == values["n_dead"]
    rate = result.firing_rates[result.firing_rates > 0].min().log10()
    first = next(low for low, n in zip(histogram["log10_from"], histogram["features"], strict=True) if n)
    assert first <= rate < first + 0.25


def _saes(tmp_path: Path) -> dict[str, Any]:
    widths = {Z: tiny.HOOK_Z_WIDTH, MLP: tiny.D_MODEL, tiny.ATTN_OUT: tiny.D_MODEL}
    saes = {}
    for i, (hook, width) in enumerate([*widths.items(), (tiny.ATTN_OUT, tiny.D_MODEL)]):
        sae = get_sae_training_class("standard")[0](tiny.sae_config("standard", d_in=width, d_sae=24 + i))
        sae.cfg.metadata.hook_name = hook
        sae.b_enc.data += 0.2 * torch.randn(sae.cfg.d_sae)
        saes[f"{hook}/{i}"] = sae
    z = saes[f"{Z}/0"]
    z.cfg.reshape_activations = "hook_z"
    z.save_inference_model(tmp_path / "z")
    saes[f"{Z}/0"] = SAE.load_from_disk(tmp_path / "z")
    return saes


@pytest.mark.parametrize("kind", ["model", "bridge", "hooked_llama"])
def test_several_saes_in_one_pass_equal_the_dense_twin_one_by_one(
    kind: str, request: pytest.FixtureRequest, dataset: Any, tmp_path: Path
) -> None:
    model = request.getfixturevalue(kind)
    saes = _saes(tmp_path)
    z_width = model.cfg.n_heads * model.cfg.d_head
    if z_width != tiny.HOOK_Z_WIDTH:
        del saes[f"{Z}/0"]
    else:
        assert saes[f"{Z}/0"].hook_z_reshaping_mode
    tokens = torch.tensor(dataset["tokens"][:40])
    tokens[3, 5] = tokens[7, 2] = 1  # EOS in the middle
    together = asi.evaluate(saes, model, tokens, loss_tokens=320, batch_size=7, progress=False)
    keep = ~torch.isin(tokens, torch.tensor(SPECIAL)).flatten()
    _, cache = model.run_with_cache(tokens, prepend_bos=False)
    for name, sae in saes.items():
        hook = sae.cfg.metadata.hook_name
        x = cache[hook].reshape(tokens.numel(), -1)[keep]
        had_heads = getattr(sae, "hook_z_reshaping_mode", False)
        alone = asi.evaluate(sae, model, tokens, loss_tokens=320, batch_size=40, progress=False)
        assert together[name].hook_name == hook
        assert getattr(sae, "hook_z_reshaping_mode", False) == had_heads
        if had_heads:
            sae.turn_off_forward_pass_hook_z_reshaping()
        check(together[name], dense(sae, x))
        check(alone, dense(sae, x))
        assert together[name].loss.to_dict() == pytest.approx(alone.loss.to_dict(), rel=1e-4)
    assert len({result.loss.clean for result in together.values()}) == 1
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


def test_the_loss_leaves_special_tokens_alone(model: Any, dataset: Any) -> None:
    sae = get_sae_training_class("standard")[0](tiny.sae_config("standard"))
    sae.cfg.metadata.hook_name = tiny.ATTN_OUT
    tokens = torch.tensor(dataset["tokens"][:20])
    tokens[:, 0] = 0
    keep = tokens != 0

    def replace(activations: Tensor, hook: Any) -> Tensor:
        activations[keep] = sae(activations[keep]).detach()
        return activations

    result = asi.evaluate(sae, model, tokens, progress=False).loss
    logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[(tiny.ATTN_OUT, replace)])
    log_probabilities = logits[:, 1:-1].log_softmax(-1)
    expected = -log_probabilities.gather(-1, tokens[:, 2:, None]).mean()
    assert result.n_tokens == 20 * 14
    assert result.reconstructed == pytest.approx(expected.item(), rel=1e-5)
    assert abs(result.zero - result.clean) > 1e-3


def test_n_tokens_and_loss_tokens_are_counted_apart(model: Any, dataset: Any) -> None:
    sae = get_sae_training_class("standard")[0](tiny.sae_config("standard"))
    sae.cfg.metadata.hook_name = tiny.ATTN_OUT
    result = asi.evaluate(sae, model, dataset, n_tokens=20, loss_tokens=10 * 16, batch_size=2, progress=False)
    assert result.n_tokens == 20
    assert result.loss.n_tokens == 10 * 15
    result = asi.evaluate(sae, model, dataset, n_tokens=33, loss_tokens=0, ranks=False, progress=False)
    assert (result.n_tokens, result.loss, result.effective_rank) == (33, None, None)


def test_an_sae_on_one_head_sees_that_head(model: Any, dataset: Any) -> None:
    sae = get_sae_training_class("standard")[0](tiny.sae_config("standard", d_in=4))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_head_index = Z, 2
    tokens = torch.tensor(dataset["tokens"][:30])
    result = asi.evaluate(sae, model, tokens, progress=False)
    _, cache = model.run_with_cache(tokens, prepend_bos=False)
    check(result, dense(sae, cache[Z][:, :, 2].reshape(-1, 4)))
    assert result.loss.kl_zero > 0


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        ("model.layers.0.self_attn.o_proj", "blocks.0.hook_attn_out"),
        ("model.layers.0.self_attn", "blocks.0.hook_attn_out"),
        ("model.layers.0.mlp", "blocks.0.hook_mlp_out"),
        ("model.layers.0", "blocks.0.hook_resid_post"),
    ],
)
@pytest.mark.parametrize("kind", ["bridge", "hooked_llama"])
def test_modules_of_transformers_lead_to_hooks(
    kind: str, module: str, hook: str, request: pytest.FixtureRequest, dataset: Any
) -> None:
    sae = get_sae_training_class("standard")[0](tiny.sae_config("standard"))
    tokens = torch.tensor(dataset["tokens"][:30])
    results = []
    for name in (module, hook):
        sae.cfg.metadata.hook_name = name
        results.append(asi.evaluate(sae, request.getfixturevalue(kind), tokens, progress=False))
    assert results[0].nmse == pytest.approx(results[1].nmse, rel=1e-6)
    assert torch.equal(results[0].firing_counts, results[1].firing_counts)
    assert results[0].loss.to_dict() == pytest.approx(results[1].loss.to_dict(), rel=1e-5)


def test_bad_input_is_refused_with_the_way_out(model: Any, dataset: Any) -> None:
    sae = get_sae_training_class("standard")[0](tiny.sae_config("standard"))
    for arguments in ({}, {"model": model}, {"model": model, "data": dataset, "activations": torch.ones(3, 16)}):
        with pytest.raises(ValueError, match="either activations"):
            asi.evaluate(sae, **arguments)
    with pytest.raises(ValueError, match="hook_name="):
        asi.evaluate(sae, model, dataset)
    with pytest.raises(ValueError, match=r"no hook.*hook_attn_ou.*did you mean.*hook_attn_out"):
        asi.evaluate(sae, model, dataset, hook_name="blocks.1.hook_attn_ou")
    with pytest.raises(ValueError, match=r"wide: .*hook_z.* width 12, but the SAE has d_in=16"):
        asi.evaluate({"wide": sae}, model, dataset, hook_name=Z, progress=False)
    with pytest.raises(ValueError, match="n_tokens=1 must be at least 2"):
        asi.evaluate(sae, activations=torch.ones(3, 16), n_tokens=1)
    with pytest.raises(ValueError, match="at least 2 activations, got 1"):
        asi.evaluate(sae, activations=tiny.activations(1), progress=False)
    with pytest.raises(ValueError, match="no token that counts"):
        asi.evaluate(sae, model, torch.zeros(4, 8, dtype=torch.long), hook_name=MLP, progress=False)
    with pytest.raises(ValueError, match="no SAE"):
        asi.evaluate({}, activations=torch.ones(3, 16))
    with pytest.raises(ValueError, match="NaN or infinity"):
        asi.evaluate(sae, activations=torch.full((3, 16), torch.nan), progress=False)


def test_transcoders_and_temporal_saes_are_refused() -> None:
    from sae_lens import Transcoder, TranscoderConfig

    transcoder = Transcoder(TranscoderConfig(d_in=16, d_sae=8, d_out=16, apply_b_dec_to_input=False))
    with pytest.raises(ValueError, match="transcoder: it predicts another hook"):
        asi.evaluate(transcoder, activations=torch.ones(3, 16))
    temporal, temporal_config = get_sae_class("temporal")
    cfg = temporal_config(d_in=16, d_sae=256, n_heads=4)
    with pytest.raises(ValueError, match="'t' is a temporal SAE"):
        asi.evaluate({"t": temporal(cfg)}, activations=torch.ones(3, 16))


def test_of_several_saes_a_bad_one_is_left_out_with_a_warning(
    model: Any, dataset: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good, nan, huge = (get_sae_training_class("standard")[0](tiny.sae_config("standard")) for _ in range(3))
    with torch.no_grad():
        nan.W_enc[0, 0] = torch.nan
        huge.W_dec.fill_(3e38)
    how: dict[str, Any] = {"hook_name": MLP, "n_tokens": 200, "loss_tokens": 48, "progress": False}
    alone = asi.evaluate(good, model, dataset, **how)
    results = asi.evaluate({"nan": nan, "good": good, "huge": huge}, model, dataset, **how)
    assert list(results) == ["good"]
    assert results["good"].to_dict() == alone.to_dict()
    assert "'nan': weights are NaN or infinite (1 of W_enc)" in caplog.text
    assert "huge: among 200 activations or their reconstructions are NaN or infinity" in caplog.text
    with pytest.raises(ValueError, match=r"sae: weights are NaN or infinite \(1 of W_enc\)"):
        asi.evaluate(nan, model, dataset, **how)
    with pytest.raises(ValueError, match=r"none of a, b can be evaluated: 'a': weights.*; 'b': weights"):
        asi.evaluate({"a": nan, "b": nan}, activations=tiny.activations(50), progress=False)


def test_an_sae_of_another_width_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    good, wide = (get_sae_training_class("standard")[0](tiny.sae_config("standard", d_in=d)) for d in (16, 17))
    results = asi.evaluate({"wide": wide, "good": good}, activations=tiny.activations(50), progress=False)
    assert list(results) == ["good"]
    assert "wide: " in caplog.text
    assert "d_in=17" in caplog.text
