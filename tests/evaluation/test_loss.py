import math
from types import SimpleNamespace

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saelens_asi.evaluation import reconstruction
from saelens_asi.evaluation.loss import Place, sae_loss_recovered, sae_losses_recovered
from saelens_asi.evaluation.metrics import SAELossRecovered

N_CTX, D_MODEL = 10, 16
HOOK = "blocks.0.hook_attn_out"


@pytest.fixture(scope="module")
def model():
    config = HookedTransformerConfig(
        n_layers=1, d_model=D_MODEL, n_ctx=N_CTX, d_head=8, n_heads=2, d_mlp=32, d_vocab=30, act_fn="relu", seed=0,
        init_weights=True, device="cpu",
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    with torch.no_grad():  # larger than the default, so that the hook matters for the loss
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 30, (7, N_CTX), generator=torch.Generator().manual_seed(0))


class StandIn:
    """An SAE that puts out ``factor`` times its input, and counts its inputs."""

    def __init__(self, factor):
        self.factor = factor
        self.cfg = SimpleNamespace(d_in=D_MODEL, d_sae=D_MODEL)
        self.n_seen = 0
        self.width = D_MODEL

    def encode(self, x):
        assert x.shape[1:] == (self.width,)
        self.n_seen += len(x)
        return x * self.factor

    def decode(self, acts):
        return acts


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.0.attn.hook_z", "blocks.0.hook_resid_post"])
def test_a_perfect_sae_recovers_everything_and_a_silent_one_nothing(model, tokens, hook_name):
    perfect = sae_loss_recovered(model, StandIn(1), tokens, hook_name)
    silent = sae_loss_recovered(model, StandIn(0), tokens, hook_name)
    assert abs(perfect.zero - perfect.clean) > 0.01  # the hook matters, or the ratio would mean nothing
    assert (perfect.clean, perfect.zero) == (silent.clean, silent.zero)
    assert perfect.recovered == 1
    assert silent.recovered == 0


def test_losses_are_those_of_the_model(model, tokens):
    def ablate(activation, hook):
        activation[:, 1:] = 0
        return activation

    def halve(activation, hook):
        activation[:, 1:] *= 0.5
        return activation

    result = sae_loss_recovered(model, StandIn(0.5), tokens, HOOK)
    for name, hooks in {"clean": [], "zero": [(HOOK, ablate)], "reconstructed": [(HOOK, halve)]}.items():
        expected = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks).item()
        assert getattr(result, name) == pytest.approx(expected, rel=1e-5)
    assert len({result.clean, result.zero, result.reconstructed}) == 3


def test_recovered_is_the_share_of_the_lost_loss():
    result = SAELossRecovered(clean=3.0, zero=5.0, reconstructed=3.5, kl_zero=2.0, kl_reconstructed=0.5, n_tokens=1)
    assert (result.recovered, result.kl_recovered) == (0.75, 0.75)


def test_the_sae_sees_every_position_but_the_first(model, tokens):
    sae = StandIn(1)
    assert sae_loss_recovered(model, sae, tokens, HOOK).n_tokens == tokens[:, 1:].numel()
    assert sae.n_seen == tokens[:, 1:].numel()


def test_the_loss_does_not_depend_on_the_batch_size(model, tokens, monkeypatch):
    whole = sae_loss_recovered(model, StandIn(0.5), tokens, HOOK)
    monkeypatch.setattr(reconstruction, "_MAX_DENSE_VALUES", 5 * D_MODEL)
    split = sae_loss_recovered(model, StandIn(0.5), tokens, HOOK, batch_size=3)
    assert (split.clean, split.zero) == pytest.approx((whole.clean, whole.zero), rel=1e-6)
    assert split.reconstructed == pytest.approx(whole.reconstructed, rel=1e-6)


def test_the_model_is_left_without_hooks(model, tokens):
    sae_loss_recovered(model, StandIn(0), tokens, HOOK)
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


def test_the_divergence_is_that_of_the_next_token_distributions(model, tokens):
    def ablate(activation, hook):
        activation[:, 1:] = 0
        return activation

    clean, ablated = (
        model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)[:, :-1].double().log_softmax(-1)
        for hooks in ([], [(HOOK, ablate)])
    )
    expected = (clean.exp() * (clean - ablated)).sum(-1).mean().item()
    result = sae_loss_recovered(model, StandIn(0), tokens, HOOK)
    assert result.kl_zero == pytest.approx(expected, rel=1e-4)
    assert result.kl_recovered == pytest.approx(0, abs=1e-6)
    assert sae_loss_recovered(model, StandIn(1), tokens, HOOK).kl_recovered == pytest.approx(1, abs=1e-5)


def test_several_saes_at_once_lose_what_each_loses_alone(model, tokens):
    places = {"half": Place(HOOK), "tenth": Place(HOOK), "z": Place("blocks.0.attn.hook_z")}
    saes = {name: (StandIn(factor), places[name]) for name, factor in (("half", 0.5), ("tenth", 0.1), ("z", 0.7))}
    replaced = torch.ones_like(tokens, dtype=torch.bool)
    replaced[:, 0] = False
    together = sae_losses_recovered(model, saes, tokens, replaced=replaced)
    for name, (sae, place) in saes.items():
        assert together[name] == sae_loss_recovered(model, sae, tokens, place.hook_name)


def test_an_sae_on_one_head_replaces_that_head_only(model, tokens):
    sae = StandIn(0)
    sae.cfg.d_in = sae.width = 8
    replaced = torch.ones_like(tokens, dtype=torch.bool)

    def ablate(z, hook):
        z[:, :, 1] = 0
        return z

    place = Place("blocks.0.attn.hook_z", head=1)
    result = sae_losses_recovered(model, {"head": (sae, place)}, tokens, replaced=replaced)["head"]
    expected = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(place.hook_name, ablate)]).item()
    assert result.reconstructed == pytest.approx(expected, rel=1e-5)
    assert result.zero == pytest.approx(expected, rel=1e-5)
    assert result.clean != pytest.approx(expected, rel=1e-3)


def test_an_sae_of_another_width_is_refused_with_both_widths(model, tokens):
    sae = StandIn(1)
    sae.cfg.d_in = 12
    with pytest.raises(ValueError, match=r"width 16, but the SAE has d_in=12"):
        sae_loss_recovered(model, sae, tokens, HOOK)


def test_a_share_of_nothing_is_not_a_number_and_null_in_json(model):
    result = SAELossRecovered(clean=3.0, zero=3.0, reconstructed=3.5, kl_zero=0.0, kl_reconstructed=0.5, n_tokens=1)
    assert math.isnan(result.recovered)
    assert result.to_dict()["recovered"] is None
    assert result.to_dict()["kl_recovered"] is None
    assert result.to_dict()["clean"] == 3.0
