"""What the top principal components of a hook recover of a model's predictions."""

from __future__ import annotations

import math

import pytest
import torch

from saelens_asi import ComponentLosses, activation_spectra, loss_recovered
from saelens_asi.activations.replacement import Predictions, replacement_losses
from tests.helpers import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")

TOKENS = torch.tensor(tiny.tokens(24)["tokens"])
HOOK = "blocks.1.hook_attn_out"


@pytest.fixture(params=["hooked_llama", "bridge"])
def any_model(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def log_probabilities(model, tokens, *hooks):
    logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=list(hooks))
    return logits[:, :-1].double().log_softmax(-1).detach()


def test_losses_are_those_computed_directly(any_model):
    """Clean, zero, mean and two numbers of components, with a special token that is left alone."""
    tokens = TOKENS.clone()
    tokens[:, 0] = 0
    (spectrum,) = activation_spectra(any_model, tokens, [HOOK], progress=False).values()
    result = loss_recovered(any_model, tokens, HOOK, [3, 9], batch_size=5)
    mean = spectrum.mean.float()

    def replace(function):
        def hook(x, hook):
            x = x.clone()
            x[:, 1:] = function(x[:, 1:])
            return x

        return HOOK, hook

    def project(k):
        v = spectrum.principal_directions(k).float()
        return replace(lambda x: mean + (x - mean) @ v @ v.T)

    clean = log_probabilities(any_model, tokens)
    cases = {
        "zero": (result.zero, replace(torch.zeros_like)),
        "mean": (result.mean, replace(lambda x: mean.expand_as(x))),
        "3": (result.components[3], project(3)),
        "9": (result.components[9], project(9)),
    }
    targets = tokens[:, 2:, None]
    assert result.n_tokens == targets.numel()
    expected = float(-clean[:, 1:].gather(2, targets).mean())
    assert result.clean == (pytest.approx(expected, rel=1e-5), 0)
    for name, (predictions, hook) in cases.items():
        changed = log_probabilities(any_model, tokens, hook)[:, 1:]
        divergence = (clean[:, 1:].exp() * (clean[:, 1:] - changed)).sum(-1).mean()
        assert predictions.cross_entropy == pytest.approx(float(-changed.gather(2, targets).mean()), rel=1e-5), name
        assert predictions.kl == pytest.approx(float(divergence), rel=1e-4), name


def test_logits_are_made_where_a_next_token_counts_and_nowhere_else(any_model):
    made = []
    handle = any_model.unembed.register_forward_hook(lambda module, inputs, output: made.append(output[..., 0].numel()))
    predicted = torch.rand(len(TOKENS), tiny.CONTEXT - 1, generator=torch.Generator().manual_seed(0)) < 0.3
    everywhere = torch.ones_like(TOKENS, dtype=torch.bool)
    functions = {"zero": torch.zeros_like, "same": lambda x: x}
    found = replacement_losses(
        any_model, TOKENS, HOOK, functions, replaced=everywhere, predicted=predicted, batch_size=24
    )
    handle.remove()
    assert made == [int(predicted.sum())] * 3
    assert found["same"] == (pytest.approx(found["clean"].cross_entropy, rel=1e-6), pytest.approx(0, abs=1e-7))
    with pytest.MonkeyPatch.context() as patch:  # as for a model whose unembedding cannot be told
        patch.setattr("saelens_asi.activations.hooks.nn.Module", type(None))
        whole = replacement_losses(
            any_model, TOKENS, HOOK, functions, replaced=everywhere, predicted=predicted, batch_size=24
        )
    for name, one in found.items():
        assert one == pytest.approx(whole[name], rel=1e-6, abs=1e-7)


def test_what_is_replaced_in_the_unembedding_itself_is_seen_whole(model):
    """All logits are the same: each word is as likely as the other."""
    everywhere = torch.ones_like(TOKENS, dtype=torch.bool)
    for hook in ("unembed.hook_in", "unembed.hook_out"):
        found = replacement_losses(model, TOKENS, hook, {"zero": torch.zeros_like}, replaced=everywhere)
        if hook == "unembed.hook_out":
            assert found["zero"].cross_entropy == pytest.approx(math.log(tiny.N_WORDS), rel=1e-6)


@pytest.mark.parametrize("n_words_at_once", [1, 7 * tiny.N_WORDS, 10**6])
def test_chunks_of_tokens_change_nothing(model, n_words_at_once, monkeypatch):
    everywhere = torch.ones_like(TOKENS, dtype=torch.bool)
    expected = replacement_losses(model, TOKENS, HOOK, {"zero": torch.zeros_like}, replaced=everywhere)
    monkeypatch.setattr("saelens_asi.activations.replacement._CHUNK", n_words_at_once)
    found = replacement_losses(model, TOKENS, HOOK, {"zero": torch.zeros_like}, replaced=everywhere)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_bar_tells_how_far_it_is(model, capsys):
    loss_recovered(model, TOKENS, HOOK, [4, 8])
    shown = capsys.readouterr().err
    assert "Loss by components: 100%" in shown
    assert f"{TOKENS.numel() * 5 / 1000:.2f}k/" in shown
    loss_recovered(model, TOKENS, HOOK, [4], progress=False)
    assert "Loss by components" not in capsys.readouterr().err


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.attn.hook_z", "blocks.1.hook_resid_post"])
def test_all_components_recover_everything_and_more_components_more(any_model, hook):
    result = loss_recovered(any_model, TOKENS, hook, [16, 1, 4, 8, 4])
    assert list(result.components) == [1, 4, 8, 16]
    for baseline in ("zero", "mean"):
        assert result.recovered(16, baseline) == pytest.approx(1, abs=1e-3)
        assert result.kl_recovered(16, baseline) == pytest.approx(1, abs=1e-5)
        assert result.kl_recovered(4, baseline) < result.kl_recovered(8, baseline) < 1
    assert not any(point.fwd_hooks for point in any_model.hook_dict.values())


def test_a_spectrum_of_other_text_is_used(bridge):
    (other,) = activation_spectra(bridge, TOKENS[12:], [HOOK], progress=False).values()
    own = loss_recovered(bridge, TOKENS[:12], HOOK, [2])
    foreign = loss_recovered(bridge, TOKENS[:12], HOOK, [2], spectrum=other)
    assert own.components[2].kl != foreign.components[2].kl
    assert own.zero == foreign.zero


@pytest.mark.parametrize("numbers", [[], [0, 4], [17]])
def test_numbers_of_components_that_cannot_be_are_refused(bridge, numbers):
    with pytest.raises(ValueError, match="between 1 and d=16"):
        loss_recovered(bridge, TOKENS, HOOK, numbers)


def test_what_does_not_fit_is_refused(model, bridge):
    (z,) = activation_spectra(model, TOKENS, ["blocks.0.attn.hook_z"], progress=False).values()
    with pytest.raises(ValueError, match="spectrum has width 12, but the hook has width 16"):
        loss_recovered(bridge, TOKENS, HOOK, [4], spectrum=z)
    with pytest.raises(ValueError, match="no hook of this model"):
        loss_recovered(bridge, TOKENS, "blocks.1.hook_out_attn", [4])
    everywhere = torch.ones_like(TOKENS, dtype=torch.bool)
    with pytest.raises(ValueError, match="no next token is left"):
        replacement_losses(bridge, TOKENS, HOOK, {}, replaced=everywhere, predicted=~everywhere[:, 1:])


def made_up(zero=4.0, mean=3.0, clean=2.0):
    components = {
        2: Predictions(3.5, 0.6),
        4: Predictions(2.05, 0.04),
        6: Predictions(2.3, 0.1),
        8: Predictions(2, 0.02),
    }
    return ComponentLosses(HOOK, Predictions(clean, 0), Predictions(zero, 1.0), Predictions(mean, 0.5), components, 100)


def test_fractions_are_the_papers():
    loss = made_up()
    assert loss.recovered(2) == pytest.approx(0.25)
    assert loss.recovered(2, "mean") == pytest.approx(-0.5)
    assert loss.kl_recovered(2) == pytest.approx(0.4)
    assert loss.kl_recovered(4, "mean") == pytest.approx(0.92)
    with pytest.raises(ValueError, match="baseline='none'"):
        loss.recovered(2, "none")


def test_components_needed_are_those_from_which_on_it_stays_recovered():
    """Four components recover 95 %, but six do not: the answer is eight."""
    loss = made_up()
    assert loss.components_needed(0.95, "zero", "cross_entropy") == 8
    assert loss.components_needed(0.85, "zero", "cross_entropy") == 6 - 2
    assert loss.components_needed(0.9) == 4
    assert loss.components_needed(0.99) is None
    with pytest.raises(ValueError, match="measure='l2'"):
        loss.components_needed(measure="l2")


def test_an_ablation_that_lowers_the_loss_is_pointed_out():
    assert made_up().warning() is None
    warning = made_up(mean=1.9).warning()
    assert f"{HOOK}: mean ablation lowers the cross-entropy" in warning
    assert "clean 2.0000, mean 1.9000" in warning
    assert "zero and mean ablation" in made_up(zero=1.8, mean=1.9).warning()
    assert math.isnan(made_up(zero=2.0).recovered(2))
