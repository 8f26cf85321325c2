"""Weights of a process that holds some of the features: rows of those of one process, to the bit."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from saelens_asi.initialization import (
    ActiveSubspaceInit,
    Initialization,
    initialize_,
    random_directions_,
    whole_kaiming_rows_,
)
from saelens_asi.initialization.norm import _rounded
from saelens_asi.sparse.shards import Processes, Shard, bounds
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum
from tests.helpers.processes import in_processes
from tests.helpers.reference import gaussian, orthogonal

D_IN, D_SAE, K = 24, 203, 4


def _shards(d_sae: int, n: int) -> list[Shard]:
    return [Shard(d_sae, first, stop) for first, stop in bounds(d_sae, n)]


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("d_init", [None, 5, 17])
@pytest.mark.parametrize("chunk", [16, 48, 64, 512])
def test_directions_are_rows_of_those_of_one_process(n: int, d_init: int | None, chunk: int) -> None:
    """Chunks that lie in one process, in several, and in none of it."""
    basis = None if d_init is None else orthogonal(1, D_IN)[:d_init].T
    whole, generator = torch.empty(D_SAE, D_IN), torch.Generator().manual_seed(3)
    random_directions_(whole, basis, generator, chunk=chunk)
    for shard in _shards(D_SAE, n):
        own, same = torch.empty(shard.n_features, D_IN), torch.Generator().manual_seed(3)
        random_directions_(own, basis, same, shard, chunk)
        assert torch.equal(own, shard.own(whole))
        assert torch.equal(same.get_state(), generator.get_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("d_sae", "d_in", "chunk"), [(203, 7, 10), (64, 5, 16), (1001, 3, 1), (33, 129, 65_536)])
def test_rows_are_those_of_the_whole_kaiming_initialization(
    dtype: torch.dtype, d_sae: int, d_in: int, chunk: int
) -> None:
    torch.manual_seed(5)
    whole = nn.init.kaiming_uniform_(torch.empty(d_sae, d_in, dtype=dtype))
    state = torch.get_rng_state()
    for shard in [*_shards(d_sae, 1), *_shards(d_sae, 3)]:
        own = torch.empty(shard.n_features, d_in, dtype=dtype)
        torch.manual_seed(5)
        whole_kaiming_rows_(own, shard, chunk)
        assert torch.equal(own, shard.own(whole))
        assert torch.equal(torch.get_rng_state(), state)


@given(st.floats(1e-30, 1e30), st.integers(-40, 40))
def test_a_rounded_norm_has_twelve_bits_and_is_the_nearest(value: float, exponent: int) -> None:
    rounded = _rounded(value)
    assert abs(rounded / value - 1) <= 2**-12
    assert (math.frexp(rounded)[0] * 2**12).is_integer()
    assert _rounded(rounded) == rounded
    assert _rounded(value * 2.0**exponent) == rounded * 2.0**exponent


class _TopKOfAll(nn.Module):
    """The k largest scores of each token over all processes."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.shard = shard

    def forward(self, scores: Tensor) -> Tensor:
        of_all = torch.cat(self.shard.features.gather_rows(scores.T.contiguous())).T
        best = of_all.topk(K, dim=1)
        kept = torch.zeros_like(of_all).scatter_(1, best.indices, best.values.relu())
        return self.shard.own(kept, dim=1)


class _ShardedSAE(nn.Module):
    """What an initialization needs of an SAE whose features are spread over processes."""

    def __init__(self, shard: Shard, apply_b_dec_to_input: bool) -> None:
        super().__init__()
        self.shard, n = shard, shard.n_features
        self.cfg = SimpleNamespace(
            d_sae=n,
            decoder_init_norm=0.1,
            apply_b_dec_to_input=apply_b_dec_to_input,
            rescale_acts_by_decoder_norm=False,
        )
        self.W_dec, self.W_enc = nn.Parameter(torch.ones(n, D_IN)), nn.Parameter(torch.ones(D_IN, n))
        self.b_dec, self.b_enc = nn.Parameter(torch.zeros(D_IN)), nn.Parameter(torch.zeros(n))
        self.activation_fn: nn.Module = _TopKOfAll(shard)

    def encode(self, x: Tensor) -> Tensor:
        seen = x - self.b_dec if self.cfg.apply_b_dec_to_input else x
        acts: Tensor = self.activation_fn(seen @ self.W_enc + self.b_enc)
        return acts

    def decode(self, acts: Tensor) -> Tensor:
        return self.shard.features.sum_(acts @ self.W_dec) + self.b_dec


def _x() -> Tensor:
    strong = gaussian(0, 600, 6) * torch.linspace(3, 1, 6, dtype=torch.float64)
    return (strong @ orthogonal(2, D_IN)[:6] + 0.1 * gaussian(3, 600, D_IN) + 2 * gaussian(1, D_IN)).float()


def _initialized(apply_b_dec_to_input: bool, with_fit: bool) -> tuple[dict[str, Tensor], Shard, Initialization, float]:
    shard = Processes.spread(1, "cpu").shard(D_SAE)
    sae, x = _ShardedSAE(shard, apply_b_dec_to_input), _x()
    spectrum = Spectrum.from_moments(RunningMoments.zeros(D_IN).update_(x))
    fit = _TopKOfAll(shard) if with_fit else None
    result = initialize_(sae, ActiveSubspaceInit(d_init=6), spectrum, x[:200], fit)
    with torch.no_grad():
        error = float((x[:200] - sae.decode(sae.encode(x[:200]))).double().square().sum())
    variance = float((x[:200] - x[:200].mean(0)).double().square().sum())
    weights = {name: value.detach() for name, value in sae.named_parameters()}
    # By value: groups of processes are not pickled.
    return weights, Shard(D_SAE, shard.first, shard.stop), result, error / variance


@pytest.mark.parametrize(("apply_b_dec_to_input", "with_fit"), [(True, False), (False, False), (True, True)])
def test_weights_and_norm_are_those_of_one_process(apply_b_dec_to_input: bool, with_fit: bool) -> None:
    weights, _, result, nmse = _initialized(apply_b_dec_to_input, with_fit)
    assert result.initial_nmse == pytest.approx(nmse, rel=1e-4)
    for n in (2, 3, 4):
        for own, shard, own_result, _ in in_processes(n, _initialized, apply_b_dec_to_input, with_fit):
            assert torch.equal(own["W_dec"], shard.own(weights["W_dec"]))
            assert torch.equal(own["W_enc"], shard.own(weights["W_enc"], dim=1))
            assert torch.equal(own["b_enc"], shard.own(weights["b_enc"]))
            assert torch.equal(own["b_dec"], weights["b_dec"])
            assert own_result.norm == result.norm == _rounded(result.norm)
            assert own_result.initial_nmse == pytest.approx(result.initial_nmse, rel=1e-6)
    assert bool(weights["b_enc"].any()) != apply_b_dec_to_input
