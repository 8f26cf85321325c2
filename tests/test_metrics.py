from types import SimpleNamespace

import pytest
import torch
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saelens_asi import metrics
from saelens_asi.metrics import SAELossRecovered, firing_rates, reconstruction_metrics, sae_loss_recovered
from tests.reference import gaussian

D_IN, D_SAE = 6, 12
N_CTX, D_MODEL = 10, 16
HOOK = "blocks.0.hook_attn_out"


@torch.no_grad()
def make_sae():
    """A ReLU SAE whose features 3 and 7 can never fire."""
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE))
    sae.W_dec.copy_(gaussian(0, D_SAE, D_IN))
    sae.W_enc.copy_(gaussian(1, D_IN, D_SAE))
    sae.b_dec.copy_(gaussian(2, D_IN))
    sae.b_enc[[3, 7]] = -1e6
    return sae


def activations(n=90):
    return (gaussian(3, n, D_IN) * 3 + 20).float()


def test_metrics_are_those_computed_directly():
    sae, x = make_sae(), activations()
    with torch.no_grad():
        acts = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        reconstruction = acts @ sae.W_dec + sae.b_dec
    result = reconstruction_metrics(sae, [x])
    nmse = (x - reconstruction).double().square().sum() / (x - x.mean(dim=0)).double().square().sum()
    assert result.n_tokens == 90
    assert result.nmse == pytest.approx(float(nmse), rel=1e-5)
    assert result.l0 == pytest.approx(float((acts > 0).sum(dim=1).float().mean()), rel=1e-6)
    assert result.dead_fraction == pytest.approx(float((acts == 0).all(dim=0).float().mean()))


def test_the_mean_of_the_activations_scores_one():
    sae, x = make_sae(), activations()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(x.mean(dim=0))
    assert reconstruction_metrics(sae, [x]).nmse == pytest.approx(1, rel=1e-5)


def test_features_that_never_fire_are_counted_as_dead():
    sae, x = make_sae(), activations(2000)
    x[:1000] = -x[:1000]  # so that every other feature fires on one half or the other
    assert reconstruction_metrics(sae, [x]).dead_fraction == pytest.approx(2 / D_SAE)
    sae.b_enc.data[5] = -1e6
    assert reconstruction_metrics(sae, [x]).dead_fraction == pytest.approx(3 / D_SAE)


def test_a_feature_that_fires_in_one_batch_only_is_alive():
    sae, x = make_sae(), activations()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_enc[2] = float(-((x - sae.b_dec) @ sae.W_enc)[:, 2].topk(2).values.mean())  # one token's worth
    result = reconstruction_metrics(sae, x.split(10))
    assert result.dead_fraction == pytest.approx(1 - 1 / D_SAE)
    assert result.l0 == pytest.approx(1 / 90)


@pytest.mark.parametrize("split", [1, 7, 90])
@pytest.mark.parametrize("dense_values", [D_SAE, 5 * D_SAE, metrics._MAX_DENSE_VALUES])
def test_batching_does_not_matter(split, dense_values, monkeypatch):
    sae, x = make_sae(), activations()
    whole = reconstruction_metrics(sae, [x])
    monkeypatch.setattr(metrics, "_MAX_DENSE_VALUES", dense_values)
    result = reconstruction_metrics(sae, x.split(split))
    assert (result.n_tokens, result.dead_fraction, result.l0) == (whole.n_tokens, whole.dead_fraction, whole.l0)
    assert result.nmse == pytest.approx(whole.nmse, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_activations_are_understood():
    results = []
    for sparse in (True, False):
        options = {"rescale_acts_by_decoder_norm": False, "use_sparse_activations": sparse}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3, **options))
        sae.load_state_dict({**make_sae().state_dict(), "b_enc": torch.zeros(D_SAE)})
        results.append(reconstruction_metrics(sae, activations().split(40)))
    sparse, dense = results
    assert sparse.l0 == dense.l0 <= 3
    assert sparse.dead_fraction == dense.dead_fraction
    assert sparse.nmse == pytest.approx(dense.nmse, rel=1e-5)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_activations_are_refused_with_their_number(n):
    with pytest.raises(ValueError, match=f"at least 2 activations, got {n}"):
        reconstruction_metrics(make_sae(), [activations(n)])


def test_metrics_as_a_dict_hold_every_field():
    result = reconstruction_metrics(make_sae(), [activations()])
    assert result.to_dict() == vars(result)


@pytest.mark.parametrize("split", [7, 90])
def test_firing_rates_are_the_shares_of_tokens(split):
    sae, x = make_sae(), activations()
    with torch.no_grad():
        expected = (torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc) > 0).float().mean(dim=0)
    torch.testing.assert_close(firing_rates(sae, x.split(split)), expected)
    assert expected[3] == 0 < expected.max()


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

    def encode(self, x):
        assert x.shape[1:] == (D_MODEL,)
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
    monkeypatch.setattr(metrics, "_MAX_DENSE_VALUES", 5 * D_MODEL)
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
