"""The sparse path of a Lorsa against a dense twin written out: outputs, every gradient, and what memory it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saelens_asi.lorsa import Llama3Scaling, Lorsa, LorsaConfig, RotaryPositions
from saelens_asi.lorsa.model import HOOKS
from saelens_asi.lorsa.sparse_features import SparseFeatures, decode

ROTARY = RotaryPositions(
    dim=4,
    base=50.0,
    llama3=Llama3Scaling(factor=4, low_freq_factor=1, high_freq_factor=4, original_context=32),
)
CONFIGS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk without relu": {"relu": False},
    "more than the positive ones": {"k": 20},
    "all": {"k": 24, "relu": False},
    "batch-topk": {"activation": "batch_topk"},
    "batch-topk without relu": {"activation": "batch_topk", "relu": False},
    "rotary": {"positions": "rotary", "rotary": ROTARY},
    "window": {"window": 3},
    "soft cap": {"soft_cap": 1.5},
    "soft cap and window": {"soft_cap": 1.5, "window": 2},
    "QK-norm": {"qk_norm": True, "attn_scale": 1.0},
    "one head": {"n_qk_heads": 1},
}


def make(dtype: torch.dtype = torch.float64, **settings: Any) -> Lorsa:
    shape = {"d_model": 6, "n_qk_heads": 4, "n_ov_heads": 24, "d_qk": 4, "k": 5, "n_ctx": 16}
    lorsa = Lorsa(LorsaConfig(**{**shape, **settings})).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in lorsa.parameters():
            param += 0.5 * torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype)
    return lorsa


def inputs(batch: int = 2, n_positions: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, n_positions, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def dense_twin(lorsa: Lorsa, x: Tensor) -> tuple[Tensor, Tensor]:
    """(output, features) of a Lorsa, feature by feature from the definition (arXiv 2504.20938)."""
    cfg = lorsa.cfg
    columns = []
    for i in range(cfg.n_ov_heads):
        head = i // (cfg.n_ov_heads // cfg.n_qk_heads)
        q, k = x @ lorsa.W_Q[head] + lorsa.b_Q[head], x @ lorsa.W_K[head] + lorsa.b_K[head]
        if cfg.qk_norm:
            q = q / (q.square().mean(-1, keepdim=True) + cfg.qk_norm_eps).sqrt() * lorsa.q_norm[head]
            k = k / (k.square().mean(-1, keepdim=True) + cfg.qk_norm_eps).sqrt() * lorsa.k_norm[head]
        if cfg.rotary is not None:
            q, k = ((t[..., :2] + 1j * t[..., 2:]) * torch.complex(lorsa.cos, lorsa.sin)[: x.shape[1]] for t in (q, k))
            q, k = (torch.cat([t.real, t.imag], dim=-1) for t in (q, k))
        scores = q @ k.mT / (cfg.attn_scale or cfg.d_qk**0.5)
        if cfg.soft_cap is not None:
            scores = cfg.soft_cap * torch.tanh(scores / cfg.soft_cap)
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        visible = (distance >= 0) & (distance < (cfg.window or x.shape[1]))
        pattern = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        columns.append((pattern @ (x @ lorsa.W_V[i] + lorsa.b_V[i])[..., None])[..., 0])
    pre = torch.stack(columns, dim=-1)
    flat = pre.flatten(0, 1)
    if cfg.activation == "batch_topk":
        lowest = flat.flatten().topk(cfg.k * flat.shape[0]).values[-1]
    else:
        lowest = flat.topk(cfg.k, dim=1).values[:, -1:]
    z = torch.where(flat >= lowest, flat.relu() if cfg.relu else flat, 0.0)
    return (z @ lorsa.W_O + lorsa.b_D).view(*x.shape), z


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_equals_the_dense_twin_in_values_and_in_every_gradient(settings: dict[str, Any]) -> None:
    lorsa = make(**settings).train()
    weight = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    results = []
    for function in (lambda x: dense_twin(lorsa, x)[0], lorsa):
        x = inputs().requires_grad_()
        lorsa.zero_grad(set_to_none=True)
        y = function(x)
        (y * weight).sum().backward()
        gradients = {name: param.grad.clone() for name, param in lorsa.named_parameters()}
        results.append({"y": y.detach(), "x": x.grad.clone(), **gradients})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert expected.abs().max() > 0


@pytest.mark.parametrize("settings", [{}, {"activation": "batch_topk"}, {"window": 3}], ids=["topk", "batch", "window"])
def test_features_equal_the_dense_twin(settings: dict[str, Any]) -> None:
    lorsa = make(**settings).train()
    encoded = lorsa.encode(inputs())
    torch.testing.assert_close(encoded.to_dense(24), dense_twin(lorsa, inputs())[1])
    assert (encoded.rows.diff() >= 0).all()


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_the_path_with_hooks_equals_the_sparse_one(settings: dict[str, Any]) -> None:
    lorsa = make(**settings).train()
    x, plain = inputs(), {}
    y = lorsa(x)
    y.square().sum().backward()
    plain = {name: param.grad.clone() for name, param in lorsa.named_parameters()}
    lorsa.zero_grad()
    seen: dict[str, Tensor] = {}
    with lorsa.hooks(**{name: (lambda value, name=name: seen.__setitem__(name, value)) for name in HOOKS}):
        hooked = lorsa(x)
    torch.testing.assert_close(hooked, y)
    hooked.square().sum().backward()
    for name, param in lorsa.named_parameters():
        torch.testing.assert_close(param.grad, plain[name])
    n_qk = lorsa.cfg.n_qk_heads
    assert seen["q"].shape == seen["k"].shape == (2, n_qk, 7, 4)
    assert seen["pattern"].shape == (2, n_qk, 7, 7)
    torch.testing.assert_close(seen["pattern"].sum(-1), torch.ones(2, n_qk, 7, dtype=torch.float64))
    assert seen["pre_activations"].shape == seen["features"].shape == (2, 7, 24)
    seen.clear()
    lorsa(x)
    assert not seen


def test_a_hook_can_change_a_result_and_an_unknown_one_is_refused() -> None:
    lorsa = make()
    with lorsa.hooks(features=torch.zeros_like):
        torch.testing.assert_close(lorsa(inputs()), lorsa.b_D.expand(2, 7, 6))
    with pytest.raises(ValueError, match="no hook"), lorsa.hooks(scores=print):
        pass


def test_later_positions_alone_equal_those_of_the_whole() -> None:
    for settings in CONFIGS.values():
        if settings.get("activation") == "batch_topk":
            continue
        lorsa = make(**settings)
        torch.testing.assert_close(lorsa(inputs(), n_new=3), lorsa(inputs())[:, -3:])


def test_positions_that_may_not_be_attended_to_do_not_matter() -> None:
    lorsa = make(positions="rotary", rotary=ROTARY)
    x = inputs()
    allowed = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    allowed[0, ..., :2] = False
    y = lorsa(x, allowed=allowed)
    torch.testing.assert_close(y[0, 2:], lorsa(x[:1, 2:])[0])  # rotary positions are relative
    torch.testing.assert_close(y[1], lorsa(x)[1])
    assert y.isfinite().all()


def test_rows_that_were_not_selected_have_no_gradient() -> None:
    lorsa = make(k=1)
    features = lorsa.encode(inputs())
    lorsa(inputs()).sum().backward()
    fired = torch.zeros(24, dtype=torch.bool)
    fired[features.features[features.values > 0]] = True
    assert 0 < fired.sum() < 24
    for name in ("W_V", "W_O", "b_V"):
        assert torch.equal(getattr(lorsa, name).grad.reshape(24, -1).any(dim=1), fired)


def test_batch_topk_uses_the_tracked_threshold_in_evaluation() -> None:
    lorsa = make(activation="batch_topk", k=3).train()
    features = lorsa.encode(inputs())
    assert features.values.numel() == 3 * 14
    lowest = float(features.values.detach().min())
    assert float(lorsa.threshold) == lowest
    lorsa.eval()
    evaluated = lorsa.encode(inputs()).to_dense(24)
    torch.testing.assert_close(evaluated, features.to_dense(24) * (features.to_dense(24) > lowest))
    lorsa.threshold.fill_(1e9)
    torch.testing.assert_close(lorsa(inputs()), lorsa.b_D.expand(2, 7, 6))  # nothing fires


def test_decode_takes_rows_without_features() -> None:
    features = SparseFeatures(torch.tensor([2.0, 3.0]), torch.tensor([1, 0]), torch.tensor([0, 0, 2]))
    W_O = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert decode(features, W_O).tolist() == [[0, 0], [3, 2], [0, 0]]
    assert features.to_dense(2).tolist() == [[0, 0], [3, 2], [0, 0]]


class _LargestLive(TorchDispatchMode):
    """Most values held at once in tensors that grow with batch x positions x features."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.live, self.peak = least, {}, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.least:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes() // tensor.element_size()
                    weakref.finalize(tensor, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize("n_qk_heads", [1, 2, 8, 16])
def test_memory_never_holds_the_dense_features_more_than_once(n_qk_heads: int) -> None:
    n_ov, batch, n_positions = 4096, 4, 64
    lorsa = make(torch.float32, d_model=6, n_qk_heads=n_qk_heads, n_ov_heads=n_ov, n_ctx=64, k=4)
    x = inputs(batch, n_positions, torch.float32)
    dense = batch * n_positions * n_ov
    with _LargestLive(dense // 64) as memory:
        lorsa(x).sum().backward()
    assert dense // 16 <= memory.peak <= dense
    with _LargestLive(dense // 64) as twin:
        pattern = lorsa.scores(n_positions, n_positions).pattern(*lorsa.queries_and_keys(x))
        (lorsa.activate(lorsa.pre_activations(pattern, x)) @ lorsa.W_O).sum().backward()
    assert twin.peak > 2 * dense  # the same measure sees what the dense path holds
