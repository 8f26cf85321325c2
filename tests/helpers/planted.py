"""SAEs with features that are dead for a known cause, and low-rank activations with a mean to kill them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers import tiny

D_IN, D_ACTIVE, N_LIVE, N_PLANTED, K = 32, 8, 96, 16, 4


def _basis() -> Tensor:
    """Orthonormal columns: the active subspace, then the mean's direction, then what nothing varies along.

    The entries of the mean are of one size, so that a step of Adam along it stays along it.
    """
    generator = torch.Generator().manual_seed(7)
    signs = torch.randint(0, 2, (D_IN, 1), generator=generator) * 2.0 - 1
    columns = torch.linalg.qr(torch.cat([signs, torch.randn(D_IN, D_IN - 1, generator=generator)], dim=1))[0]
    return torch.cat([columns[:, 1 : D_ACTIVE + 1], columns[:, :1], columns[:, D_ACTIVE + 1 :]], dim=1)


def mean() -> Tensor:
    return 4 * _basis()[:, D_ACTIVE]


def activations(n: int, seed: int = 0) -> Tensor:
    """(n, D_IN), nearly all variance in D_ACTIVE dimensions, around ``mean()``."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.randn(n, D_ACTIVE, generator=generator) * torch.linspace(3, 1.5, D_ACTIVE) @ _basis()[:, :D_ACTIVE].T
    return inside + mean() + 0.02 * torch.randn(n, D_IN, generator=generator)


def directions(n: int, seed: int, columns: slice = slice(0, D_ACTIVE)) -> Tensor:
    """(n, D_IN) unit rows in the span of some columns of the basis."""
    basis = _basis()[:, columns]
    coefficients = torch.randn(n, basis.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(coefficients, dim=1) @ basis.T


def rows(causes: list[str], offset: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Encoder rows and biases of N_LIVE live features and N_PLANTED for each cause, and which are planted."""
    weight, bias = [directions(N_LIVE, 1)], [torch.full((N_LIVE,), offset)]
    planted, start = {}, N_LIVE
    for i, cause in enumerate(causes):
        own, b = directions(N_PLANTED, 10 + i), torch.full((N_PLANTED,), offset)
        if cause == "outside":
            own = directions(N_PLANTED, 10 + i, slice(D_ACTIVE + 1, D_IN))
        elif cause == "mean":
            own = own - 10 * mean() / mean().norm()
        elif cause == "norm":
            own = 0.01 * own
        elif cause == "bias":
            b = b - 60
        elif cause == "duplicate":
            own = 0.05 * weight[0][2 * torch.arange(N_PLANTED)]
        elif cause == "several":
            own = 0.01 * (own - 40 * mean() / mean().norm())
        elif cause == "broken":
            own = torch.zeros_like(own)
        weight.append(own)
        bias.append(b)
        planted[cause] = torch.arange(start, start + N_PLANTED)
        start += N_PLANTED
    return torch.cat(weight), torch.cat(bias), planted


@torch.no_grad()
def sae(architecture: str, causes: list[str], offset: float = -1.0, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A training SAE with those features, and which of them were planted for each cause.

    Scores lie ``offset`` above 0 (below, where negative), so that ReLU features need some length to fire at all.
    """
    weight, bias, planted = rows(causes, offset)
    own: dict[str, Any] = {"k": K} if architecture.endswith("topk") else {}
    if "topk" in architecture:
        own["rescale_acts_by_decoder_norm"] = False
    if architecture == "matching_pursuit":
        own["max_iterations"] = K
    if architecture == "matryoshka_batchtopk":
        own["matryoshka_widths"] = [N_LIVE, len(bias)]
    made = tiny.training_sae(architecture, d_in=D_IN, d_sae=len(bias), **{**own, **settings})
    if architecture == "matching_pursuit":
        made.W_dec.data.copy_(weight)
        return made, planted
    made.W_enc.data.copy_(weight.T)
    made.W_dec.data.copy_(torch.nn.functional.normalize(weight, dim=1))
    if architecture == "gated":
        made.b_gate.data.copy_(bias)
        made.b_mag.data.zero_()
    elif architecture == "jumprelu":
        made.b_enc.data.zero_()
        made.threshold.data.copy_(-bias)
    else:
        made.b_enc.data.copy_(bias)
    return made, planted
