"""A score that is not a number is selected, by every way of selecting: the loss then tells, as SAELens's own does."""

from __future__ import annotations

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from saelens_asi.plugin.topk_pass import encoder_of, sparse_pass
from saelens_asi.sparse.kernels import kernels_take
from saelens_asi.sparse.rows import Workspace, row_norms
from saelens_asi.sparse.screens import ProjectionScreen, QuantizedScreen, can_be_quantized
from saelens_asi.sparse.topk import Encoder, Query, encode_batch_top_k, encode_top_k
from tests.helpers import tiny

pytestmark = pytest.mark.bits

NAN = float("nan")


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("place", ["x", "W_enc", "b_enc", "W_dec"])
def test_the_loss_is_finite_only_where_saelens_is(architecture, rescale, value, place):
    torch.manual_seed(0)
    sae = tiny.training_sae(architecture, rescale_acts_by_decoder_norm=rescale)
    x = tiny.activations(32)
    with torch.no_grad():
        sae.b_enc += 0.5
        if place == "x":
            x[3, 2] = value
        elif place == "W_dec":
            sae.W_dec[:, 1] = value
        else:
            getattr(sae, place)[..., 5] = value
    made = TrainStepInput(x, {}, None, 0, False)
    stock = sae.training_forward_pass(made).loss
    norms = row_norms(sae.W_dec.detach()) if rescale else None
    ours = sparse_pass(sae, made, encoder_of(sae, norms), Workspace()).output.loss
    if not stock.isfinite():
        assert not ours.isfinite()


def _planted(value: float, row: int) -> tuple[torch.Tensor, Encoder]:
    torch.manual_seed(1)
    rows, x = torch.randn(512, 32), torch.randn(64, 32)
    rows[row, 7] = value
    return x, Encoder(rows, torch.zeros(512), None)


@pytest.mark.parametrize("row", [0, 77, 511])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("screen", ["projection", "quantized"])
def test_no_screen_drops_it_where_it_is_looked_at(screen, stale, row):
    """A screen made before somebody wrote to a row may leave it out; where it scores the row, it has to tell."""
    x, encoder = _planted(NAN, row)
    before = Encoder(encoder.rows.nan_to_num(50.0), encoder.bias)  # a row that every positive token selects
    made_of = before if stale else encoder
    if screen == "quantized":
        if not (kernels_take(encoder.rows) and can_be_quantized(before)):
            pytest.skip("no exact 8-bit products on this processor")
        made = QuantizedScreen.of(made_of)
    else:
        made = ProjectionScreen.of(made_of, torch.linalg.qr(torch.randn(32, 12))[0])
    best = made.top_k(x, encoder, 8, Workspace())
    whole = encode_top_k(x, encoder, [Query(8)], Workspace())[0]
    assert whole.scores.isnan().any(dim=1).all()
    told = best.scores.isnan().any(dim=1)
    assert told[before.rows[row] @ x.t() > 60].all() if stale else told.all()


def test_a_whole_batch_keeps_it():
    x, encoder = _planted(NAN, 77)
    entries, _ = encode_batch_top_k(x, encoder, 8 * 64, [], Workspace())
    assert len(entries.scores) == 8 * 64
    assert int(entries.scores.isnan().sum()) == 64
    finite, _ = encode_batch_top_k(x, Encoder(encoder.rows.nan_to_num(0.0), encoder.bias), 8 * 64, [], Workspace())
    kept = entries.scores[~entries.scores.isnan()].sort().values
    assert torch.equal(kept, finite.scores.sort().values[64:])
