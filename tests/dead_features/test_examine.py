"""The autopsy finds each cause of death that was planted, calls no live feature dead, and reads every architecture."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from saelens_asi import Autopsy, SparseAdam, autopsy
from saelens_asi.dead_features.changes import Parts, Split, Typical, inside, longer, unbiased, without_mean
from saelens_asi.dead_features.contests import Encoding, Rows
from saelens_asi.dead_features.record import VERDICT_TITLES, VERDICTS
from tests.helpers import planted, tiny

SINGLE = ["outside", "mean", "norm", "bias"]
CAUSES = {
    "topk": [*SINGLE, "duplicate", "several", "broken"],
    "batchtopk": [*SINGLE, "duplicate", "several", "broken"],
    "matryoshka_batchtopk": [*SINGLE, "duplicate", "several"],
    "abstopk": ["outside", "norm", "duplicate", "broken"],
    "standard": [*SINGLE, "duplicate", "several", "broken"],
    "gated": [*SINGLE, "duplicate", "several", "broken"],
    "jumprelu": [*SINGLE, "duplicate", "several", "broken"],
    "matching_pursuit": ["outside", "duplicate", "broken"],
}


def look(sae: Any, x: Any, **settings: Any) -> Autopsy:
    return autopsy(sae, x, progress=False, **{"dead_rate": 0.01, **settings})  # shown by 300 tokens


def verdict_of(found: Autopsy) -> dict[int, str]:
    return dict(zip(found.dead.tolist(), found.verdicts, strict=True))


@pytest.mark.parametrize("architecture", CAUSES)
def test_it_finds_every_planted_cause_and_no_live_feature_dead(architecture: str) -> None:
    offset = 0.0 if architecture in ("abstopk", "matching_pursuit") else -1.0
    sae, where = planted.sae(architecture, CAUSES[architecture], offset)
    x = planted.activations(4000)
    found = look(sae, x)
    acts = sae.encode(x)
    fired = (acts.to_dense() if acts.is_sparse else acts).ne(0).any(dim=0)
    assert torch.equal(found.dead, (~fired).nonzero().squeeze(1))
    assert fired[: planted.N_LIVE].double().mean() > 0.9
    verdicts = verdict_of(found)
    for cause, features in where.items():
        given = [verdicts.get(i) for i in features.tolist()]
        assert given.count(cause) >= 0.95 * len(given), (cause, given)


def test_verdicts_stand_in_counts_table_and_advice() -> None:
    sae, where = planted.sae("topk", CAUSES["topk"])
    found = look(sae, planted.activations(4000))
    assert sum(found.counts.values()) == len(found.dead) == len(found.verdicts)
    assert set(found.counts) == set(CAUSES["topk"])
    for cause, features in where.items():
        assert set(found.having(cause).tolist()) <= set(features.tolist())
        assert VERDICT_TITLES[cause] in found.summary()
    for setting in (
        'initializer="active_subspace"',
        'center="mean"',
        'norm="least_squares"',
        "aux_loss_coefficient",
        "lr_warm_up_steps",
    ):
        assert setting in found.summary()
    assert "Stale momentum was not looked for" in str(found)
    assert found.gamma == pytest.approx(4 / planted.activations(4000).var(dim=0).sum().sqrt().item(), rel=0.02)
    assert found.gamma_seen == pytest.approx(found.gamma)
    assert found.d_active == planted.D_ACTIVE


def test_gamma_is_of_what_the_encoder_sees_and_of_the_activations() -> None:
    sae, _ = planted.sae("topk", ["norm"])
    sae.b_dec.data.copy_(planted.mean())
    found = look(sae, planted.activations(4000))
    assert found.gamma == pytest.approx(4 / planted.activations(4000).var(dim=0).sum().sqrt().item(), rel=0.03)
    assert found.gamma_seen < 0.05


@pytest.mark.parametrize("architecture", ["topk", "standard", "gated", "jumprelu"])
def test_a_revived_row_fires_in_the_sae_itself(architecture: str) -> None:
    """What the counterfactual counts is what SAELens does with the changed weights."""
    sae, where = planted.sae(architecture, SINGLE)
    x = planted.activations(3000)
    found = look(sae, x)
    rows, center = Encoding.of(sae).rows, x.mean(dim=0)
    basis = torch.linalg.svd(x - center, full_matrices=False).Vh[: found.d_active].T
    typical = Typical.of(rows.at(found.features.fires > 0))
    for cause, change in {
        "outside": lambda own: inside(own, basis),
        "norm": lambda own: longer(own, typical.norm),
        "bias": lambda own: unbiased(own, typical.bias),
    }.items():
        for feature in where[cause][:4]:
            own = torch.tensor([int(feature)])
            changed = change(Split.of(rows.at(own), center))
            made, _ = planted.sae(architecture, SINGLE)
            made.W_enc.data[:, own] = changed.weight.T
            offset = changed.mean_score - changed.weight @ center + changed.bias
            if architecture == "gated":
                made.b_gate.data[own] = offset
                made.b_mag.data[own] = 1e3  # the gate decides
            elif architecture == "jumprelu":
                made.threshold.data[own] = 0
                made.b_enc.data[own] = offset
            else:
                made.b_enc.data[own] = offset
            with torch.no_grad():
                fires = int((made.encode(x)[:, own] != 0).sum())
            counted = int(found.evidence.fires_if[cause][found.dead == feature])
            assert abs(fires - counted) <= max(2, 0.01 * counted)
            assert fires >= found.fires_at_least


def test_with_the_decoder_bias_at_the_mean_features_kept_out_by_it_fire() -> None:
    sae, where = planted.sae("topk", ["mean"])
    x = planted.activations(3000)
    found = look(sae, x)
    sae.b_dec.data.copy_(x.mean(dim=0))
    with torch.no_grad():
        fires = (sae.encode(x) != 0).sum(dim=0)[where["mean"]]
    counted = found.evidence.fires_if["mean"][torch.isin(found.dead, where["mean"])]
    assert bool((fires > 0).all())
    assert (fires - counted).abs().max() <= 3


def test_the_mean_can_kill_without_opposition() -> None:
    """Features along the mean fill the top k of every token: one that is orthogonal to the mean never gets in."""
    sae, _ = planted.sae("topk", ["norm"], offset=0.0)
    own = sae.W_enc.data[:, : planted.K] + 3 * planted.mean()[:, None] / planted.mean().norm()
    sae.W_enc.data[:, : planted.K] = own / own.norm(dim=0)
    found = look(sae, planted.activations(4000) + 5 * planted.mean())
    assert set(found.having("mean").tolist()) == set(range(planted.K, planted.N_LIVE))


def test_starved_features_fire_on_ten_times_the_tokens() -> None:
    """Rows set to fire on one in 5,000 tokens: those that 3,000 tokens do not show are named, and do fire."""
    sae, where = planted.sae("topk", ["bias", "norm"])
    rows, many = where["bias"], planted.activations(150_000, seed=5)
    with torch.no_grad():
        bars = torch.cat([b.bars for x in many.split(5000) for b in Encoding.of(sae).contests(x)])
        scores = many @ sae.W_enc.data[:, rows]
        sae.b_enc.data[rows] = -(scores - bars[:, None]).topk(30, dim=0).values[-1] - 1e-4
    few = planted.activations(3000, seed=6)
    found = look(sae, few)
    silent = rows[torch.isin(rows, found.dead)]
    assert len(silent) >= 6
    named = [verdict_of(found)[i] for i in silent.tolist()]
    assert named.count("starved") >= 0.9 * len(named)
    assert set(found.having("starved").tolist()) <= set(rows.tolist())
    with torch.no_grad():
        fires = sum((sae.encode(x) != 0).any(dim=0)[silent].int() for x in planted.activations(30_000, 8).split(5000))
    assert (fires > 0).double().mean() >= 0.8


def momentum_run(counted: bool = True, optimizer_class: Any = torch.optim.Adam) -> tuple[Any, dict, torch.Tensor, Any]:
    """Live rows that get one gradient, along the mean, and then a silence in which Adam carries them off."""
    sae, where = planted.sae("topk", ["momentum", "norm", "outside"])
    rows, parameters = where["momentum"], list(sae.parameters())
    names = [name for name, _ in sae.named_parameters()]
    groups: Any = parameters
    if optimizer_class is SparseAdam:
        row_dims = {"W_enc": 1, "W_dec": 0, "b_enc": 0}
        groups = [{"params": [p], "row_dim": row_dims.get(n)} for n, p in zip(names, parameters, strict=True)]
    optimizer = optimizer_class(groups, lr=0.13)
    before = None
    for step in range(20):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        if step == 5:
            sae.W_enc.grad[:, rows] = planted.mean()[:, None] * (1 + torch.rand(planted.D_IN, len(rows)))
        optimizer.step()
        if step == 5:
            before = sae.W_enc.detach().clone()
    state: dict[str, Any] = optimizer.state_dict()
    if counted:
        silent = torch.full((sae.cfg.d_sae,), 20.0)
        silent[rows] = 14
        state = {"optimizer": state, "n_forward_passes_since_fired": silent}
    return sae, state, rows, before


@pytest.mark.parametrize("counted", [True, False])
def test_it_finds_what_stale_momentum_killed(counted: bool) -> None:
    sae, state, rows, before = momentum_run(counted)
    x = planted.activations(4000)
    found = look(sae, x, optimizer_state=state)
    verdicts = verdict_of(found)
    alive = planted.sae("topk", ["momentum", "norm", "outside"])[0]
    alive.W_enc.data.copy_(before)
    with torch.no_grad():
        lived = (alive.encode(x) != 0).sum(dim=0)[rows] >= 3  # less often, silence could be chance
        killed = rows[lived & torch.isin(rows, found.dead)]
    assert len(killed) >= 12
    assert {verdicts[i] for i in killed.tolist()} == {"momentum"}
    assert set(found.having("momentum").tolist()) == set(killed.tolist())
    assert 'optimizer="sparse_adam"' in found.summary()
    at = torch.isin(found.dead, rows)
    drift = (sae.W_enc.detach() - before)[:, rows].norm(dim=0) / before[:, rows].norm(dim=0)
    if counted:
        assert set(found.evidence.silent_steps[at].tolist()) == {14}
        torch.testing.assert_close(found.evidence.drift[at], drift, rtol=1e-3, atol=0)
    # without the state there is another change that would revive them, and the table says what is missing
    assert "momentum" not in set(look(sae, x).verdicts)


def test_sparse_adam_leaves_nothing_to_find() -> None:
    sae, state, rows, before = momentum_run(optimizer_class=SparseAdam)
    assert torch.equal(sae.W_enc.detach()[:, rows], before[:, rows])
    found = look(sae, planted.activations(4000), optimizer_state=state)
    assert "momentum" not in found.counts
    assert not found.evidence.drift.any()


def test_one_batch_many_batches_and_a_stream_are_the_same() -> None:
    sae, _ = planted.sae("topk", CAUSES["topk"])
    x = planted.activations(3000)
    whole = look(sae, x, n_sample=500)
    for parts in (x.split(700), iter(x.split(1)[:0] + x.split(256)), [x[:5].reshape(5, 1, -1), x[5:]]):
        other = look(sae, parts, n_sample=500)
        assert whole.verdicts == other.verdicts
        assert torch.equal(whole.dead, other.dead)
        assert torch.equal(whole.features.fires, other.features.fires)
        for cause, fires in whole.evidence.fires_if.items():
            assert (fires - other.evidence.fires_if[cause]).abs().max() <= 1  # rounding at the bar


def test_the_sample_is_drawn_evenly() -> None:
    sae, _ = planted.sae("topk", SINGLE)
    x = planted.activations(3000)
    full = look(sae, x)
    part = look(sae, x, n_sample=600)
    assert (full.n_sample, part.n_sample) == (3000, 600)
    for cause in SINGLE:
        expected = full.evidence.fires_if[cause].double().sum() / 5
        assert float(part.evidence.fires_if[cause].sum()) == pytest.approx(float(expected), rel=0.2, abs=20)


def test_its_dictionary_is_strict_json() -> None:
    sae, _ = planted.sae("topk", CAUSES["topk"])
    found = look(sae, planted.activations(1000))
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["counts"] == found.counts
    assert read["dead"]["feature"] == found.dead.tolist()
    assert read["dead"]["verdict"] == list(found.verdicts)
    assert {len(column) for column in read["dead"].values()} == {len(found.dead)}
    assert read["settings"]["duplicate_cosine"] == 0.95


def test_where_nothing_is_dead_it_says_so() -> None:
    sae, _ = planted.sae("standard", [])
    found = look(sae, planted.activations(1000))
    assert (len(found.dead), found.verdicts, found.counts) == (0, (), {})
    assert "nothing to change" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_where_nothing_is_dead_an_optimizer_state_changes_nothing() -> None:
    sae, _ = planted.sae("standard", [])
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-12)
    sae(planted.activations(500)).sum().backward()
    optimizer.step()
    found = look(sae, planted.activations(1000), optimizer_state=optimizer.state_dict())
    assert (len(found.dead), found.verdicts) == (0, ())


def test_where_nothing_lives_it_still_ends() -> None:
    sae, _ = planted.sae("standard", ["outside"], offset=-1e4)
    found = look(sae, planted.activations(500))
    assert found.dead_fraction == 1
    assert set(found.evidence.twin.tolist()) == {-1}
    json.dumps(found.to_dict(), allow_nan=False)


def test_rows_that_are_not_finite_are_named() -> None:
    sae, where = planted.sae("standard", ["norm"])
    sae.W_enc.data[3, where["norm"][:2]] = math.nan
    sae.b_enc.data[where["norm"][2]] = -math.inf
    found = look(sae, planted.activations(500))
    assert found.having("broken").tolist() == where["norm"][:3].tolist()
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_it_reads_saes_as_they_choose(architecture: str, normalize: str) -> None:
    """The check inside would refuse; for matching pursuit the features that fire are compared here."""
    sae = tiny.training_sae(architecture, normalize_activations=normalize)
    for name, parameter in sae.named_parameters():
        if name != "threshold":
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    x = tiny.activations(300)
    with torch.no_grad():
        acts = sae.encode(x)
    fires = ((acts.to_dense() if acts.is_sparse else acts) != 0).any(dim=0)
    found = look(sae, x)
    assert int(((found.features.fires > 0) != fires).sum()) <= 1
    assert not {"ln_mu", "ln_std", "x_norm_coeff"} & vars(sae).keys()


def test_activations_of_hook_z_may_have_heads(bridge: Any) -> None:
    sae = tiny.training_sae("topk", reshape_activations="hook_z")
    x = tiny.activations(200)
    flat, heads = look(sae, x), look(sae, x.reshape(200, 4, 4))
    assert flat.verdicts == heads.verdicts
    assert torch.equal(flat.features.fires, heads.features.fires)


def test_inference_saes_give_the_verdicts_of_the_training_sae(tmp_path: Any) -> None:
    from sae_lens import SAE

    sae, _ = planted.sae("topk", [*SINGLE, "duplicate"])
    sae.save_inference_model(tmp_path)
    x = planted.activations(2000)
    assert look(SAE.load_from_disk(tmp_path), x).verdicts == look(sae, x).verdicts


def test_changes_change_one_thing() -> None:
    torch.manual_seed(1)
    mean, basis = torch.randn(6), torch.linalg.qr(torch.randn(6, 2))[0]
    rows = Rows(torch.randn(5, 6), torch.randn(5))
    split = Split.of(rows, mean)
    x = torch.randn(7, 6)
    torch.testing.assert_close(split.centred().scores(x - mean), rows.scores(x))
    inner, parts = inside(split, basis), Parts.of(split.weight, basis, mean)
    torch.testing.assert_close(parts.inside + parts.along_mean + parts.outside, split.weight)
    torch.testing.assert_close(inner.weight @ basis @ basis.T + parts.along_mean, inner.weight)
    torch.testing.assert_close(inner.weight @ mean - parts.along_mean @ mean, inner.weight @ basis @ basis.T @ mean)
    assert float((parts.outside @ mean).abs().max()) < 1e-5
    torch.testing.assert_close(inner.weight.norm(dim=1), split.weight.norm(dim=1))
    torch.testing.assert_close(inner.mean_score + inner.bias, split.mean_score + split.bias)
    assert longer(split, 100).weight.norm(dim=1).tolist() == pytest.approx([100] * 5, rel=1e-5)
    assert torch.equal(longer(split, 0).weight, split.weight)
    free = without_mean(Split(torch.ones(4, 1), torch.tensor([-2.0, -2, 3, 3]), torch.tensor([-1.0, 5, -1, -5]), mean))
    assert (free.mean_score + free.bias).tolist() == [-1, 3, 0, -2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variance_share": 0}, "variance_share=0 must lie in"),
        ({"duplicate_cosine": 1.1}, "duplicate_cosine=1.1"),
        ({"more_tokens": 0.5}, "more_tokens=0.5"),
        ({"n_sample": 1}, "n_sample=1"),
        ({"dead_rate": 0}, "dead_rate=0 must lie in"),
        ({"firing_rates": "nowhere"}, "holds no sparsity.safetensors"),
        ({"firing_rates": torch.ones(3)}, "of 3 features, this SAE has 48"),
        ({"firing_rates": torch.full((48,), 2.0)}, r"shares of tokens in \[0, 1\]"),
        ({"tokens": 1}, r"no setting \['tokens'\]"),
        ({"optimizer_state": "nowhere"}, "holds no trainer_state.pt"),
        ({"optimizer_state": {"a": 1}}, "not the state of an optimizer"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        look(tiny.training_sae(), tiny.activations(50), **settings)


def test_bad_activations_are_refused() -> None:
    sae = tiny.training_sae()
    with pytest.raises(ValueError, match="do not fit an SAE of d_in=16"):
        look(sae, torch.randn(5, 17))
    with pytest.raises(ValueError, match="at least 2 activations, got 0"):
        look(sae, [])
    with pytest.raises(ValueError, match="NaN or infinity"):
        look(sae, torch.full((4, 16), math.nan))


def test_the_state_of_another_sae_is_refused() -> None:
    sae, state, _, _ = momentum_run()
    with pytest.raises(ValueError, match="give the state that belongs to this SAE"):
        look(planted.sae("topk", ["norm", "outside"])[0], planted.activations(50), optimizer_state=state)
    with pytest.raises(ValueError, match="of 4 parameters, this SAE has 2"):
        look(planted.sae("matching_pursuit", [])[0], planted.activations(50), optimizer_state=state)
    fresh = torch.optim.Adam(sae.parameters()).state_dict()
    with pytest.raises(ValueError, match="taken no step"):
        look(sae, planted.activations(50), optimizer_state=fresh)


def test_an_sae_that_chooses_otherwise_is_refused() -> None:
    sae = tiny.training_sae("topk")
    sae.activation_fn = torch.nn.Softplus()
    with pytest.raises(ValueError, match="chooses other features"):
        look(sae, tiny.activations(100))
    sae.cfg.__class__ = type("Other", (type(sae.cfg),), {"architecture": classmethod(lambda cls: "temporal")})
    with pytest.raises(ValueError, match="does not know how architecture 'temporal'"):
        look(sae, tiny.activations(100))


def test_every_verdict_has_a_title() -> None:
    assert set(VERDICT_TITLES) == set(VERDICTS)
