import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

from saelens_asi.evaluation import reconstruction
from saelens_asi.evaluation.metrics import RunningReconstruction
from saelens_asi.evaluation.reconstruction import measure_
from tests.helpers.reference import gaussian, maths

D_IN, D_SAE = 6, 12


@torch.no_grad()
def make_sae():
    """A ReLU SAE whose features 3 and 7 can never fire."""
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE))
    sae.W_dec.copy_(gaussian(0, D_SAE, D_IN))
    sae.W_enc.copy_(gaussian(1, D_IN, D_SAE))
    sae.b_dec.copy_(gaussian(2, D_IN))
    sae.b_enc[[3, 7]] = -1e6
    return sae


def metrics(sae, batches):
    running = RunningReconstruction.zeros(D_SAE, D_IN)
    for batch in batches:
        measure_(running, sae, batch)
    return running.metrics()


def activations(n=90):
    return (gaussian(3, n, D_IN) * 3 + 20).float()


def test_metrics_are_those_computed_directly():
    sae, x = make_sae(), activations()
    with torch.no_grad():
        acts = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        expected = acts @ sae.W_dec + sae.b_dec
    result = metrics(sae, [x])
    nmse = (x - expected).double().square().sum() / (x - x.mean(dim=0)).double().square().sum()
    assert result.n_tokens == 90
    assert result.nmse == pytest.approx(float(nmse), rel=1e-5)
    assert result.l0 == pytest.approx(float((acts > 0).sum(dim=1).float().mean()), rel=1e-6)
    assert result.dead_fraction == pytest.approx(float((acts == 0).all(dim=0).float().mean()))


def test_the_mean_of_the_activations_scores_one():
    sae, x = make_sae(), activations()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(x.mean(dim=0))
    assert metrics(sae, [x]).nmse == pytest.approx(1, rel=1e-5)


def test_features_that_never_fire_are_counted_as_dead():
    sae, x = make_sae(), activations(2000)
    x[:1000] = -x[:1000]  # so that every other feature fires on one half or the other
    assert metrics(sae, [x]).dead_fraction == pytest.approx(2 / D_SAE)
    sae.b_enc.data[5] = -1e6
    assert metrics(sae, [x]).dead_fraction == pytest.approx(3 / D_SAE)


def test_a_feature_that_fires_in_one_batch_only_is_alive():
    sae, x = make_sae(), activations()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_enc[2] = float(-((x - sae.b_dec) @ sae.W_enc)[:, 2].topk(2).values.mean())  # one token's worth
    result = metrics(sae, x.split(10))
    assert result.dead_fraction == pytest.approx(1 - 1 / D_SAE)
    assert result.l0 == pytest.approx(1 / 90)


@pytest.mark.parametrize("split", [1, 7, 90])
@pytest.mark.parametrize("dense_values", [D_SAE, 5 * D_SAE, reconstruction._MAX_DENSE_VALUES])
def test_batching_does_not_matter(split, dense_values, monkeypatch):
    sae, x = make_sae(), activations()
    whole = metrics(sae, [x])
    monkeypatch.setattr(reconstruction, "_MAX_DENSE_VALUES", dense_values)
    result = metrics(sae, x.split(split))
    assert (result.n_tokens, result.dead_fraction, result.l0) == (whole.n_tokens, whole.dead_fraction, whole.l0)
    assert result.nmse == pytest.approx(whole.nmse, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_activations_are_understood():
    results = []
    for sparse in (True, False):
        options = {"rescale_acts_by_decoder_norm": False, "use_sparse_activations": sparse}
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3, **options))
        sae.load_state_dict({**make_sae().state_dict(), "b_enc": torch.zeros(D_SAE)})
        results.append(metrics(sae, activations().split(40)))
    sparse, dense = results
    assert sparse.l0 == dense.l0 <= 3
    assert sparse.dead_fraction == dense.dead_fraction
    assert sparse.nmse == pytest.approx(dense.nmse, rel=1e-5)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_activations_are_refused_with_their_number(n):
    with pytest.raises(ValueError, match=f"at least 2 activations, got {n}"):
        metrics(make_sae(), [activations(n)])


def test_metrics_as_a_dict_hold_every_field():
    result = metrics(make_sae(), [activations()])
    assert result.to_dict() == vars(result)


@maths
@given(cuts=st.lists(st.integers(0, 90), max_size=4))
def test_merging_parts_in_any_order_equals_one_pass(cuts):
    sae, x = make_sae(), activations()
    parts = list(x.tensor_split(sorted(cuts)))
    merged = RunningReconstruction.zeros(D_SAE, D_IN)
    for part in reversed(parts):
        merged.merge_(measure_(RunningReconstruction.zeros(D_SAE, D_IN), sae, part))
    whole = measure_(RunningReconstruction.zeros(D_SAE, D_IN), sae, x)
    assert merged.n_tokens == whole.n_tokens
    assert torch.equal(merged.firing_counts, whole.firing_counts)
    for name in ("mean", "deviation", "error"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-6, atol=1e-9)


def test_dictionaries_of_other_shapes_are_not_merged():
    with pytest.raises(ValueError, match=r"\(12, 6\) into one of \(11, 6\)"):
        RunningReconstruction.zeros(11, D_IN).merge_(RunningReconstruction.zeros(D_SAE, D_IN))


def test_a_mean_far_from_zero_costs_no_precision():
    sae, x = make_sae(), activations(400).double()
    with torch.no_grad():
        sae.to(torch.float64)
        near = metrics(sae, x.split(50))
        sae.b_dec += 1e6
        far = metrics(sae, (x + 1e6).split(50))
    assert far.nmse == pytest.approx(near.nmse, rel=1e-6)


def test_constant_activations_are_refused():
    with pytest.raises(ValueError, match="all the same"):
        metrics(make_sae(), [torch.ones(20, D_IN)])


def test_values_that_are_not_finite_are_refused():
    x = activations()
    x[3, 2] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics(make_sae(), [x])
