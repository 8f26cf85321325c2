"""The estimate of several processes that share an SAE: weights of one process, and one of them speaks."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from sae_lens.saes.topk_sae import TopK
from torch import Tensor

from saelens_asi import ActiveSubspaceInit
from saelens_asi.activations.sae_state import shard_of
from saelens_asi.initialization import METADATA_KEY
from saelens_asi.plugin.estimate import initialize_together
from saelens_asi.plugin.sharded_sae import TopKOfAll
from saelens_asi.plugin.stream import ActivationStream
from saelens_asi.sparse.shards import Processes, Shard
from tests.helpers import tiny
from tests.helpers.processes import in_processes

_FEATURE_DIMS = {"W_enc": 1, "b_enc": 0, "W_dec": 0}


def _initialized(architecture: str, batch_shards: int) -> tuple[dict[str, Tensor], dict[str, Any], str, Shard]:
    settings = {"initializer": ActiveSubspaceInit(n_tokens=500), "batch_shards": batch_shards}
    trainer = tiny.trainer(architecture, **settings)
    stream = ActivationStream(({"hook": batch} for batch in tiny.batches()), is_training_stream=False)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        initialize_together({"hook": [trainer]}, stream)
    weights = {name: value.detach().clone() for name, value in trainer.sae.named_parameters()}
    shard = shard_of(trainer.sae)
    # Without its groups, which are not pickled.
    place = Shard(shard.d_sae, shard.first, shard.stop)
    return weights, trainer.sae.cfg.metadata[METADATA_KEY], said.getvalue(), place


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize(("n", "batch_shards"), [(3, 1), (2, 2), (4, 2)])
def test_weights_are_those_of_one_process_and_the_first_alone_says_so(
    architecture: str, n: int, batch_shards: int
) -> None:
    weights, record, said, _ = _initialized(architecture, 1)
    assert "Active subspace: " in said
    told = in_processes(n, _initialized, architecture, batch_shards)
    for own, own_record, _, shard in told:
        assert shard.n_features == 48 * batch_shards // n
        for name, whole in weights.items():
            dim = _FEATURE_DIMS.get(name)
            assert torch.equal(own[name], whole if dim is None else shard.own(whole, dim)), name
        assert own_record.pop("initial_nmse") == pytest.approx(record["initial_nmse"], rel=1e-6)
        assert own_record == {name: value for name, value in record.items() if name != "initial_nmse"}
    assert ["Active subspace: " in said for _, _, said, _ in told] == [True, *[False] * (n - 1)]
    assert {said for _, _, said, _ in told[1:]} == {""}


def _selected(scores: Tensor, k: int) -> Tensor:
    shard = Processes.spread(1, "cpu").shard(scores.shape[1])
    return TopKOfAll(k, shard.features)(shard.own(scores, dim=1))


@pytest.mark.parametrize(("n", "k"), [(1, 4), (2, 4), (3, 1), (4, 7)])
def test_the_best_of_all_processes_are_those_of_saelens_topk(n: int, k: int) -> None:
    """Also where k exceeds what a process holds, and where scores are negative."""
    scores = torch.randn(30, 17)
    scores[:10] -= 2
    selected = torch.cat(in_processes(n, _selected, scores, k), dim=1)
    assert torch.equal(selected, TopK(k)(scores))
