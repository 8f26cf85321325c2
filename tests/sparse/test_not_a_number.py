"""A score that is not a number is selected, by every way of selecting: the loss then tells, as SAELens's own does."""

from __future__ import annotations

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from saelens_asi.plugin.topk_pass import encoder_of, sparse_pass
from saelens_asi.sparse.kernels import kernels_take
from saelens_asi.sparse.rows import Workspace, row_norms
from saelens_asi.sparse.screens import EightBit, LowRank, Whole, can_be_quantized, screened_top_k
from saelens_asi.sparse.topk import Encoder, Query, encode_top_k
from tests.helpers import tiny
from tests.helpers.reference import encode_batch_top_k

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
@pytest.mark.parametrize(
    ("kind", "stale"), [(Whole, False), (LowRank, False), (LowRank, True), (EightBit, False), (EightBit, True)]
)
def test_no_screen_drops_it_where_it_is_looked_at(kind, stale, row):
    """What was made before somebody wrote to a row may leave it out; where the row is scored, it has to tell."""
    x, encoder = _planted(NAN, row)
    before = Encoder(encoder.rows.nan_to_num(50.0), encoder.bias)  # a row that every positive token selects
    if not kernels_take(encoder.rows) or (kind is EightBit and not can_be_quantized(before)):
        pytest.skip("no compiled kernels, or no exact 8-bit products on this processor")
    basis = [torch.linalg.qr(torch.randn(32, 12))[0]] if kind is LowRank else []
    made = kind.of(before if stale else encoder, *basis)
    best, _ = screened_top_k(x, encoder, 8, made, Workspace())
    whole = encode_top_k(x, encoder, [Query(8)], Workspace())[0]
    assert whole.scores.isnan().any(dim=1).all()
    told = best.scores.isnan().any(dim=1)
    assert told[before.rows[row] @ x.t() > 60].all() if stale else told.all()


def test_a_whole_batch_keeps_it():
    x, encoder = _planted(NAN, 77)
    entries = encode_batch_top_k(x, encoder, 8 * 64)
    assert len(entries.scores) == 8 * 64
    assert int(entries.scores.isnan().sum()) == 64
    finite = encode_batch_top_k(x, Encoder(encoder.rows.nan_to_num(0.0), encoder.bias), 8 * 64)
    kept = entries.scores[~entries.scores.isnan()].sort().values
    assert torch.equal(kept, finite.scores.sort().values[64:])
