"""How an SAE chooses which features fire: scores that are affine in its input, and a bar that they must pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from saelens_asi.activations.sae_state import statistics_forgotten

Rule = Literal["threshold", "top_k", "batch_top_k", "pursuit"]

_RULES: dict[str, Rule] = {
    "standard": "threshold",
    "gated": "threshold",
    "jumprelu": "threshold",
    "transcoder": "threshold",
    "skip_transcoder": "threshold",
    "jumprelu_transcoder": "threshold",
    "jumprelu_skip_transcoder": "threshold",
    "topk": "top_k",
    "abstopk": "top_k",
    "batchtopk": "batch_top_k",
    "matryoshka_batchtopk": "batch_top_k",
    "matching_pursuit": "pursuit",
}

# Values of a dense (tokens x features) matrix made at a time.
MAX_DENSE_VALUES = 2**25

_BY_COLUMN = ("W_enc",)
_BY_ROW = ("W_dec", "b_enc", "b_gate", "b_mag", "r_mag", "threshold", "log_threshold")


class Rows(NamedTuple):
    """Features whose scores are ``x @ weight.T + bias``; each fires where its score is above 0 and the bar.

    Attributes:
        weight: (n, d_in).
        bias: (n,), less a threshold of the feature's own.
    """

    weight: Tensor
    bias: Tensor

    def at(self, features: Tensor | slice) -> Rows:
        """Some of them."""
        return Rows(self.weight[features], self.bias[features])

    def scores(self, inputs: Tensor, signed: bool = False) -> Tensor:
        """(n_inputs, n); magnitudes where features may fire with either sign."""
        scores = torch.addmm(self.bias, inputs, self.weight.T)
        return scores.abs_() if signed else scores


class Contest(NamedTuple):
    """Inputs for which features compete, and what a feature that did not fire would have had to pass.

    Attributes:
        inputs: (n, d_in) as the encoder's rows see them.
        scores: (n, d_sae).
        bars: (n,), 0 or more.
    """

    inputs: Tensor
    scores: Tensor
    bars: Tensor

    @property
    def fired(self) -> Tensor:
        """(n, d_sae) bool."""
        return (self.scores >= self.bars[:, None]) & (self.scores > 0)


@dataclass(frozen=True)
class Encoding:
    """The encoder of an SAE, read from its weights.

    Attributes:
        rows: of all features, scaled as the selection scales them (``rescale_acts_by_decoder_norm``).
        rule: ``"threshold"``: each feature for itself; ``"top_k"``: the k highest of a token; ``"batch_top_k"``: the
            highest of a block of tokens; ``"pursuit"``: the highest, again and again on what is left of a token.
        signed: features fire with either sign (AbsTopK).
        broken: (d_sae,) bool, features whose row is zero or not finite. Such a row counts as zero here.
    """

    sae: SAE
    rows: Rows
    rule: Rule
    signed: bool
    broken: Tensor

    @classmethod
    def of(cls, sae: SAE) -> Encoding:
        """Raises ValueError for an architecture whose selection is not known."""
        architecture = sae.cfg.architecture()
        if architecture not in _RULES:
            raise ValueError(
                f"the autopsy does not know how architecture {architecture!r} chooses its features; it knows "
                f"{list(_RULES)}"
            )
        rows = rows_of(sae, feature_parameters(sae))
        finite = rows.weight.isfinite().all(dim=1) & rows.bias.isfinite()
        rows = Rows(rows.weight.masked_fill(~finite[:, None], 0), rows.bias.masked_fill(~finite, -torch.inf))
        broken = ~rows.weight.any(dim=1)
        return cls(sae, rows, _RULES[architecture], architecture == "abstopk", broken)

    @property
    def block(self) -> int:
        """Tokens whose scores are made at a time."""
        return max(1, MAX_DENSE_VALUES // len(self.rows.bias))

    def inputs(self, x: Tensor) -> Tensor:
        """What the rows see of (n, d_in) activations: normalised, less the decoder bias where SAELens subtracts it."""
        sae = self.sae
        # SAELens folds the last two dimensions of hook_z activations into one: here they are folded already.
        folds = getattr(sae, "hook_z_reshaping_mode", False)
        with statistics_forgotten(sae):
            seen = sae.process_sae_in(x[:, None, :] if folds else x)
        return seen.to(self.rows.weight.dtype)

    def contests(self, x: Tensor) -> Iterator[Contest]:
        """The competition for (n, d_in) activations: one contest, or one for each step of a pursuit."""
        inputs = self.inputs(x)
        if self.rule == "pursuit":
            yield from self._pursuit(inputs)
            return
        scores = self.rows.scores(inputs, self.signed)
        yield Contest(inputs, scores, self.bars(scores))

    def bars(self, scores: Tensor) -> Tensor:
        """(n,) lowest score that is chosen, from the (n, d_sae) scores of all features; 0 where the sign decides."""
        if self.rule == "threshold":
            return scores.new_zeros(len(scores))
        if self.rule == "top_k":
            return scores.topk(int(self.sae.cfg.k), dim=1).values[:, -1].clamp(min=0)
        if self.rule == "batch_top_k":
            n_chosen = min(scores.numel(), max(1, int(self.sae.cfg.k * len(scores))))
            return scores.flatten().topk(n_chosen).values[-1].clamp(min=0).expand(len(scores))
        return scores.amax(dim=1).clamp(min=0)

    def _pursuit(self, inputs: Tensor) -> Iterator[Contest]:
        cfg = self.sae.cfg
        support = torch.zeros(len(inputs), len(self.rows.bias), dtype=torch.bool, device=inputs.device)
        left = torch.arange(len(inputs), device=inputs.device)
        for _ in range(cfg.max_iterations or cfg.d_in):
            scores = self.rows.scores(inputs)
            best, winner = self.bars(scores), scores.argmax(dim=1)
            yield Contest(inputs, scores, best)
            before = support[left, winner] | (best == 0)
            support[left, winner] |= best > 0
            inputs = inputs - best[:, None] * self.rows.weight[winner]
            goes_on = torch.ones_like(before)
            if cfg.stop_on_duplicate_support:
                goes_on &= ~before
            if cfg.residual_threshold > 0:
                goes_on &= inputs.norm(dim=1) >= cfg.residual_threshold
            inputs, left = inputs[goes_on], left[goes_on]
            if not len(left):
                return

    def check(self, x: Tensor) -> None:
        """Compare with the SAE's own ``encode``. Raises ValueError where other features fire."""
        if bool((self.broken & (self.rows.bias == -torch.inf)).any()):
            return  # its own activations are not finite
        x = x[: self.block]
        folds = getattr(self.sae, "hook_z_reshaping_mode", False)
        acts = self.sae.encode(x[:, None, :] if folds else x)
        expected = (acts.to_dense() if acts.is_sparse else acts) != 0
        fired = torch.zeros_like(expected)
        if self.rule == "pursuit":
            fired = expected  # contests of a pursuit do not say which token they belong to; its test does
        else:
            for contest in self.contests(x):
                fired = contest.fired
        allowed = 1e-2 if self.sae.W_dec.dtype == torch.float32 else 0.1  # rounding at the bar
        n_other = int((expected != fired).sum())
        if n_other > max(2, allowed * int(expected.sum())):
            raise ValueError(
                f"{type(self.sae).__name__} chooses other features than its architecture "
                f"{self.sae.cfg.architecture()!r} does ({n_other} of {int(expected.sum())} choices): the autopsy "
                "cannot read it. Has its encode been replaced?"
            )


def feature_parameters(sae: SAE, features: Tensor | slice = slice(None)) -> dict[str, Tensor]:
    """Weights of some features by name, in at least float32; ``W_enc`` stays (d_in, n)."""
    parameters = {}
    for name in (*_BY_COLUMN, *_BY_ROW):
        value = getattr(sae, name, None)
        if isinstance(value, Tensor):
            value = value.detach()
            value = value[:, features] if name in _BY_COLUMN else value[features]
            parameters[name] = value.to(torch.promote_types(value.dtype, torch.float32))
    return parameters


def rows_of(sae: SAE, parameters: Mapping[str, Tensor]) -> Rows:
    """Rows with the parameters of ``feature_parameters``, which may have been changed.

    A gated feature fires where its gate and its magnitude are positive: two affine scores along one direction, of which
    the lower decides.
    """
    weight = parameters["W_enc"].T
    if "b_gate" in parameters:
        return Rows(weight, torch.minimum(parameters["b_gate"], parameters["b_mag"] * (-parameters["r_mag"]).exp()))
    bias = parameters.get("b_enc", weight.new_zeros(len(weight)))
    if "threshold" in parameters or "log_threshold" in parameters:
        threshold = parameters["log_threshold"].exp() if "log_threshold" in parameters else parameters["threshold"]
        bias = bias - threshold.clamp(min=0)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        scale = parameters["W_dec"].norm(dim=1)
        return Rows(weight * scale[:, None], bias * scale)
    return Rows(weight, bias)
