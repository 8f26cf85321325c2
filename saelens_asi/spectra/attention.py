"""Why an attention output is low-rank: the part of its inputs Z, and the part of the output weights W_O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saelens_asi.activations.hooks import HookedModel, attention_output, attention_output_weights, hook_points
from saelens_asi.activations.reader import TextPass
from saelens_asi.activations.tokens import TokenData
from saelens_asi.spectra.moments import RunningMoments
from saelens_asi.spectra.spectrum import Spectrum


@dataclass(frozen=True)
class VarianceDecomposition:
    """Var(O e) = Var(Z v/|v|) |v|^2 with v = W_O e, for unit directions e (arXiv 2508.16929 v1, section 4.3, fig. 3).

    v3 (fig. 4) draws the same on singular values: the square roots.

    Attributes:
        directions: (d_model, k) the unit vectors e: principal directions of O, largest variance first.
        variance: (k,) Var(O e), activation units squared.
        z_variance: (k,) Var(Z v/|v|): what the attention-weighted values contribute.
        w_norm_squared: (k,) |v|^2: what the output weights contribute.
        head_share: (k, n_heads) Cov(O_h e, O e) / Var(O e) with O_h the output of head h: sums to 1 over heads, and
            is negative where a head works against the others.
        head_variance: (k, n_heads) Var(O_h e), of each head alone.
        head_w_norm_squared: (k, n_heads) |v_h|^2 of each head's rows of W_O; sums to ``w_norm_squared``.
    """

    directions: Float64[Tensor, "d_model k"]
    variance: Float64[Tensor, " k"]
    z_variance: Float64[Tensor, " k"]
    w_norm_squared: Float64[Tensor, " k"]
    head_share: Float64[Tensor, "k n_heads"]
    head_variance: Float64[Tensor, "k n_heads"]
    head_w_norm_squared: Float64[Tensor, "k n_heads"]

    @property
    def head_z_variance(self) -> Float64[Tensor, "k n_heads"]:
        """(k, n_heads) Var(Z_h v_h/|v_h|); 0 where a head has no weight in the direction."""
        return self.head_variance / self.head_w_norm_squared.clamp(min=torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class AttentionDecomposition(VarianceDecomposition):
    """The decomposition of one layer's attention output, with the check that it applies.

    Attributes:
        layer: of the model.
        n_tokens: activations behind it.
        output: what O is: a hook's name, or the attention module's own output where that hook is not Z W_O.
        identity_error: root mean square of O - Z W_O - b_O over that of O around its mean, on the data.
        note: why the hook could not be used; empty where it was.
    """

    layer: int
    n_tokens: int
    output: str
    identity_error: float
    note: str


def decompose_variance(
    z_covariance: Float[Tensor, "z_width z_width"],
    weight: Float[Tensor, "z_width d_model"],
    n_heads: int,
    directions: Float[Tensor, "d_model k"],
) -> VarianceDecomposition:
    """The decomposition from the covariance of Z, in float64.

    Args:
        z_covariance: (n_heads * d_head, n_heads * d_head).
        weight: (n_heads * d_head, d_model) W_O.
        n_heads: that Z lays side by side.
        directions: (d_model, k) unit vectors.
    """
    c, w, e = z_covariance.double(), weight.double(), directions.double()
    v = w @ e
    cv = c @ v
    variance = (v * cv).sum(dim=0)
    by_head = (n_heads, v.shape[0] // n_heads, v.shape[1])
    norm_by_head = v.reshape(by_head).square().sum(dim=1).T
    norm = norm_by_head.sum(dim=1)
    own = torch.stack(
        [
            torch.einsum("ak,ab,bk->k", v[rows], c[rows, rows], v[rows])
            for rows in (slice(h * by_head[1], (h + 1) * by_head[1]) for h in range(n_heads))
        ],
        dim=1,
    )
    tiny = torch.finfo(torch.float64).tiny
    share = (v * cv).reshape(by_head).sum(dim=1).T / variance[:, None].clamp(min=tiny)
    return VarianceDecomposition(e, variance, variance / norm.clamp(min=tiny), norm, share, own, norm_by_head)


def decompose_attention_output(
    model: HookedModel,
    data: TokenData,
    layer: int,
    n_tokens: int | None = None,
    *,
    k: int | None = None,
    batch_size: int = 8,
    context_size: int = 256,
    exclude_special_tokens: bool | Sequence[int] = True,
    exclude_positions: Sequence[int] = (),
) -> AttentionDecomposition:
    """Decompose the variance of a layer's attention output O = Z W_O + b_O, per principal direction and per head.

    The identity is checked on the data first. Where ``hook_attn_out`` sits behind a post-norm (Gemma-2), it does not
    hold for that hook, and the attention module's own output is taken; ``note`` then says so.

    Args:
        model: a HookedTransformer or TransformerBridge, grouped-query attention included.
        data: as in ``activation_spectra``.
        layer: which; negative ones count from the end.
        n_tokens: activations; None for all of the data.
        k: principal directions of O; all of them unless given.
        batch_size: as in ``activation_spectra``, like the next three.
        context_size: tokens in a window.
        exclude_special_tokens: leave out BOS, EOS, padding and the like.
        exclude_positions: positions of every window that are left out too.

    Raises:
        ValueError: for a layer that does not exist, or where the identity holds for neither output.
    """
    n_layers = model.cfg.n_layers
    if not -n_layers <= layer < n_layers:
        raise ValueError(f"layer={layer} must lie between 0 and {n_layers - 1}")
    layer %= n_layers
    names = _Names(f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.attn")
    points = {**hook_points(model, names[:2]), names.own_out: attention_output(model, layer)}
    if points[names.own_out] is points[names.hook_out]:
        del points[names.own_out]
    text = TextPass(
        model,
        data,
        points,
        n_tokens,
        batch_size=batch_size,
        context_size=context_size,
        exclude_special_tokens=exclude_special_tokens,
        exclude_positions=exclude_positions,
    )
    weight, bias = attention_output_weights(model, layer)
    z_moments, checks = _read_outputs(text, names, weight, bias)
    output = _output_that_is_z_w_o(checks, layer, torch.finfo(weight.dtype).eps ** 0.5)
    spectrum = Spectrum.from_moments(checks[output].moments)
    directions = spectrum.principal_directions(k or spectrum.d)
    parts = decompose_variance(z_moments.covariance(), weight, model.cfg.n_heads, directions)
    return AttentionDecomposition(
        **vars(parts),
        layer=layer,
        n_tokens=z_moments.n_tokens,
        output=output,
        identity_error=checks[output].error,
        note=_note_on(names.hook_out, checks[names.hook_out].error) if output == names.own_out else "",
    )


class _Names(NamedTuple):
    """Of what Z is, and of what O can be: the hook, or the attention module's own output."""

    z: str
    hook_out: str
    own_out: str


def _read_outputs(
    text: TextPass, names: _Names, weight: Tensor, bias: Tensor
) -> tuple[RunningMoments, dict[str, _Check]]:
    """Moments of Z, and of all that O can be, with how far each is from Z W_O + b_O."""
    z_moments = RunningMoments.zeros(weight.shape[0], weight.device)
    checks = {name: _Check(weight.shape[1], weight.device) for name in text.points if name != names.z}
    vectors: dict[str, Tensor] = {}
    readers = {name: partial(vectors.__setitem__, name) for name in text.points}
    for windows in text.read(readers, description="Attention output", progress=False):
        if windows.n_read:
            z_moments.update_(vectors[names.z])
            expected = vectors[names.z].float() @ weight.float() + bias.float()
            for name, check in checks.items():
                check.add(vectors[name], expected)
    return z_moments, checks


def _note_on(hook_name: str, error: float) -> str:
    return (
        f"{hook_name} is not Z W_O + b_O (relative error {error:.2g}): something stands between, such as Gemma-2's "
        "norm after attention. The attention module's own output is decomposed instead"
    )


class _Check:
    """How far one output is from Z W_O + b_O, over the data; and its moments."""

    def __init__(self, d_model: int, device: torch.device) -> None:
        self.moments = RunningMoments.zeros(d_model, device)
        self.square = 0.0

    def add(self, output: Tensor, expected: Tensor) -> None:
        self.moments.update_(output)
        self.square += float((output.float() - expected.to(output.device)).double().square().sum())

    @property
    def error(self) -> float:
        spread = float(self.moments.scatter.trace())
        return (self.square / spread) ** 0.5 if spread else float("inf")


def _output_that_is_z_w_o(checks: Mapping[str, _Check], layer: int, tolerance: float) -> str:
    for name, check in checks.items():
        if check.error <= tolerance:
            return name
    errors = ", ".join(f"{check.error:.2g} for {name}" for name, check in checks.items())
    raise ValueError(
        f"the attention output of layer {layer} is not Z W_O + b_O on this data: relative error {errors}, allowed "
        f"{tolerance:.2g}. Something scales or rounds it behind W_O: load the model unquantized, without SAEs attached"
    )
