"""Low-rank sparse attention: a sparse replacement of one attention layer (arXiv 2504.20938; 2508.16929, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saelens_asi.lorsa.attention import (
    AttentionModel,
    AttentionTarget,
    attention_activations,
    measured_reach,
    named_windows,
    read_attention,
)
from saelens_asi.lorsa.config import LorsaConfig
from saelens_asi.lorsa.positions import rotary_table, rotate
from saelens_asi.lorsa.sparse_features import Scores, Selection, SparseFeatures, decode, select_features
from saelens_asi.sparse.finite import all_finite

HOOKS = ("q", "k", "pattern", "pre_activations", "features")

# Largest difference to the layer's own output, as a share of its largest value, that still counts as the same.
_TOLERANCE = 1e-3
_PROBE_POSITIONS = 288  # more than the window of GPT-Neo


class Lorsa(nn.Module):
    """Sparse features in place of an attention layer: z^i = A^h X w_v^i, top-k over i, Y = sum_i z^i w_o^i + b.

    Attributes:
        W_Q, W_K: (n_qk_heads, d_model, d_qk); b_Q, b_K: (n_qk_heads, d_qk).
        W_V, W_O: (n_ov_heads, d_model), one row a feature; b_V: (n_ov_heads,).
        b_D: (d_model,).
        q_norm, k_norm: (n_qk_heads, d_qk) scales of the QK-norm, where the config has one.
        mean_read: (n_qk_heads, d_model), subtracted from what each head reads, as a fixed part of b_V: weights of
            values then move without moving their mean. Zero unless an initialization sets it.
        threshold: () of batch-TopK, for evaluation.
        current_k: features active at a position; training may start it higher than the config's k.
        provenance: where the weights come from; saved with them.
    """

    mean_read: Tensor
    threshold: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: LorsaConfig, seed: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.current_k = cfg.k
        self.provenance: dict[str, Any] = {}
        self._hooks: dict[str, list[Callable[[Tensor], Tensor | None]]] = {name: [] for name in HOOKS}
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / math.sqrt(cfg.d_model))

        self.W_Q = normal(cfg.n_qk_heads, cfg.d_model, cfg.d_qk)
        self.W_K = normal(cfg.n_qk_heads, cfg.d_model, cfg.d_qk)
        self.b_Q = nn.Parameter(torch.zeros(cfg.n_qk_heads, cfg.d_qk))
        self.b_K = nn.Parameter(torch.zeros(cfg.n_qk_heads, cfg.d_qk))
        self.W_V = normal(cfg.n_ov_heads, cfg.d_model)
        self.W_O = normal(cfg.n_ov_heads, cfg.d_model)
        self.b_V = nn.Parameter(torch.zeros(cfg.n_ov_heads))
        self.b_D = nn.Parameter(torch.zeros(cfg.d_model))
        if cfg.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(cfg.n_qk_heads, cfg.d_qk))
            self.k_norm = nn.Parameter(torch.ones(cfg.n_qk_heads, cfg.d_qk))
        self.register_buffer("mean_read", torch.zeros(cfg.n_qk_heads, cfg.d_model))
        self.register_buffer("threshold", torch.zeros(()))
        if cfg.rotary is not None:
            cos, sin = rotary_table(cfg.rotary, cfg.n_ctx)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    @classmethod
    def from_attention(
        cls,
        model: AttentionModel,
        layer: int,
        *,
        n_ov_heads: int,
        k: int,
        n_qk_heads: int | None = None,
        **settings: Any,
    ) -> Lorsa:
        """A Lorsa whose patterns are those of an attention layer; its features are random until initialized.

        Args:
            model: a HookedTransformer or TransformerBridge.
            layer: index of the block.
            n_ov_heads: features.
            k: features active at a position.
            n_qk_heads: a multiple of the layer's query heads, each copied; as many as it has when None.
            **settings: further settings of ``LorsaConfig``.

        Raises:
            ValueError: when the layer does not exist, or does something that a Lorsa does not reproduce: a Lorsa made
                of the layer's own rank-one components is compared with the layer on random tokens, and its window
                is measured.
        """
        target = read_attention(model, layer)
        check_exact(model, target, settings.get("n_ctx"))
        return cls.from_target(target, n_ov_heads=n_ov_heads, k=k, n_qk_heads=n_qk_heads, **settings)

    @classmethod
    def from_target(
        cls, target: AttentionTarget, *, n_ov_heads: int, k: int, n_qk_heads: int | None = None, **settings: Any
    ) -> Lorsa:
        """The same from weights that ``read_attention`` returned, without the comparison."""
        n_qk = target.n_heads if n_qk_heads is None else n_qk_heads
        if n_qk < 1 or n_qk % target.n_heads:
            raise ValueError(
                f"n_qk_heads={n_qk} must be a multiple of the {target.n_heads} query heads of layer {target.layer}, "
                "which are copied in equal numbers"
            )
        shape = {"d_model": target.d_model, "n_qk_heads": n_qk, "n_ov_heads": n_ov_heads, "d_qk": target.d_head, "k": k}
        merged: dict[str, Any] = {**target.settings, **shape, **settings}
        lorsa = cls(LorsaConfig(**merged))
        copies = n_qk // target.n_heads
        with torch.no_grad():
            for name in ("W_Q", "W_K", "b_Q", "b_K"):
                getattr(lorsa, name).copy_(getattr(target, name).repeat_interleave(copies, dim=0))
            if target.q_norm is not None and target.k_norm is not None:
                lorsa.q_norm.copy_(target.q_norm.expand_as(lorsa.q_norm))
                lorsa.k_norm.copy_(target.k_norm.expand_as(lorsa.k_norm))
        lorsa.provenance = {"model": target.model_name, "layer": target.layer}
        return lorsa.to(target.W_Q.device)

    @classmethod
    def exact(cls, target: AttentionTarget) -> Lorsa:
        """The layer itself as a Lorsa: its n_heads * d_head rank-one OV components, all active, without a ReLU."""
        n = target.n_heads * target.d_head
        lorsa = cls.from_target(target, n_ov_heads=n, k=n, relu=False, skip_positions=0, activation="topk")
        with torch.no_grad():
            lorsa.W_V.copy_(target.W_V.transpose(1, 2).reshape(n, -1))
            lorsa.W_O.copy_(target.W_O.reshape(n, -1))
            lorsa.b_V.copy_(target.b_V.flatten())
            lorsa.b_D.copy_(target.b_O)
        return lorsa

    def forward(self, x: Tensor, n_new: int | None = None, allowed: Tensor | None = None) -> Tensor:
        """What the layer would put out, (batch, n_new, d_model), from what it reads.

        Args:
            x: (batch, n_positions, d_model) all positions from the first of the sequence.
            n_new: only for the last so many positions; all when None.
            allowed: bool, broadcastable to (batch, 1, n_new, n_positions): where a position may attend, beside the
                causal order and the window (padding, for example).
        """
        return self.decode(self.encode(x, n_new, allowed), x.shape[0])

    def decode(self, features: SparseFeatures, batch: int) -> Tensor:
        """(batch, n_new, d_model) from the features of batch * n_new positions."""
        return decode(features, self.W_O).unflatten(0, (batch, -1)) + self.b_D

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output without the skipped positions, and which features fired there.

        Args:
            x: (batch, n_positions, d_model) what the layer reads.

        Returns:
            (batch, n_positions - skip_positions, d_model) output; (m,) int64 indices of the selected features of all
            positions; (m,) bool, True where one of them is not zero at a position that is not skipped.
        """
        skip = self.cfg.skip_positions
        features = self.encode(x)
        y_hat = self.decode(features, x.shape[0])[:, skip:]
        fired = (features.values != 0) & (features.rows % x.shape[1] >= skip)
        return y_hat, features.features, fired

    def encode(self, x: Tensor, n_new: int | None = None, allowed: Tensor | None = None) -> SparseFeatures:
        """Active features of the batch * n_new positions, in order. Arguments as in ``forward``."""
        q, k = self.queries_and_keys(x, n_new)
        scores = self.scores(q.shape[2], k.shape[2], allowed)
        if any(self._hooks[name] for name in HOOKS[2:]):
            return self._encode_with_hooks(q, k, x, scores)
        return self._track(select_features(q, k, x, self.W_V, self.value_bias(), scores, self._selection()))

    def queries_and_keys(self, x: Tensor, n_new: int | None = None) -> tuple[Tensor, Tensor]:
        """(batch, n_qk_heads, n_new, d_qk) queries and (batch, n_qk_heads, n_positions, d_qk) keys, rotated."""
        n_positions = x.shape[1]
        if x.ndim != 3 or x.shape[-1] != self.cfg.d_model:
            raise ValueError(
                f"input of shape {tuple(x.shape)} must be (batch, n_positions, d_model={self.cfg.d_model})"
            )
        if n_positions > self.cfg.n_ctx:
            raise ValueError(
                f"a context of {n_positions} positions exceeds n_ctx={self.cfg.n_ctx} of this Lorsa: give shorter "
                "windows, or make it with a larger n_ctx"
            )
        first = 0 if n_new is None else n_positions - n_new
        heads = []
        for name, start in (("q", first), ("k", 0)):
            weight, bias = getattr(self, f"W_{name.upper()}"), getattr(self, f"b_{name.upper()}")
            y = torch.einsum("bpm,hmd->bhpd", x[:, start:], weight) + bias[:, None]
            if self.cfg.qk_norm:
                rms = (y.square().mean(dim=-1, keepdim=True) + self.cfg.qk_norm_eps).sqrt()
                y = y / rms * getattr(self, f"{name}_norm")[:, None]
            if self.cfg.rotary is not None:
                table = self.cos[start:n_positions], self.sin[start:n_positions]
                y = rotate(y, *table, self.cfg.rotary.adjacent_pairs)
            heads.append(self._hooked(name, y))
        return heads[0], heads[1]

    def scores(self, n_queries: int, n_keys: int, allowed: Tensor | None = None) -> Scores:
        """How the last ``n_queries`` positions attend to all ``n_keys``."""
        mask = None
        if n_queries != n_keys or self.cfg.window is not None or allowed is not None:
            position = torch.arange(n_keys, device=self.W_V.device)
            behind = position[n_keys - n_queries :, None] - position
            mask = behind >= 0
            if self.cfg.window is not None:
                mask &= behind < self.cfg.window
            mask = mask[None, None]
            if allowed is not None:
                mask = mask & allowed.to(mask.device)
        return Scores(self.cfg.scale, self.cfg.soft_cap, mask)

    def _selection(self) -> Selection:
        batch_topk = self.cfg.activation == "batch_topk"
        threshold = float(self.threshold) if batch_topk and not self.training else None
        return Selection(self.current_k, self.cfg.relu, across_rows=batch_topk, threshold=threshold)

    @torch.no_grad()
    def _track(self, features: SparseFeatures) -> SparseFeatures:
        """Follow the smallest selected activation in training: the threshold of batch-TopK in evaluation."""
        if self.training and self.cfg.activation == "batch_topk" and features.values.numel():
            lowest = features.values.min()
            self.threshold.copy_(torch.where(self.threshold == 0, lowest, self.threshold.lerp(lowest, 0.01)))
        return features

    def pre_activations(self, pattern: Tensor, x: Tensor) -> Tensor:
        """(batch, n_queries, n_ov_heads), dense: pattern (batch, n_qk_heads, n_queries, n_keys) times values."""
        return (pattern @ self.values(x)).transpose(1, 2).flatten(2)

    def values(self, x: Tensor) -> Tensor:
        """(batch, n_qk_heads, n_positions, group_size) value of every feature at every position."""
        v = nn.functional.linear(x, self.W_V, self.value_bias())
        return v.unflatten(-1, (self.cfg.n_qk_heads, self.cfg.group_size)).transpose(1, 2)

    def value_bias(self) -> Tensor:
        """(n_ov_heads,) what is added to the values: b_V less the values of ``mean_read``."""
        if not bool(self.mean_read.any()):
            return self.b_V
        read = torch.bmm(self.W_V.unflatten(0, (self.cfg.n_qk_heads, -1)), self.mean_read[:, :, None])
        return self.b_V - read.flatten()

    def activate(self, pre: Tensor) -> Tensor:
        """Dense features (..., n_ov_heads) from dense pre-activations: what ``encode`` does, written out."""
        selection = self._selection()
        flat = pre.flatten(0, -2)
        if selection.threshold is not None:
            selected = flat > selection.threshold
        else:
            pool = flat.reshape(1, -1) if selection.across_rows else flat
            k = selection.k * (flat.shape[0] if selection.across_rows else 1)
            index = pool.topk(k, dim=1).indices
            selected = torch.zeros_like(pool, dtype=torch.bool).scatter(1, index, True).reshape(flat.shape)
        return ((flat.relu() if selection.relu else flat) * selected).view_as(pre)

    def _encode_with_hooks(self, q: Tensor, k: Tensor, x: Tensor, scores: Scores) -> SparseFeatures:
        pattern = self._hooked("pattern", scores.pattern(q, k))
        pre = self._hooked("pre_activations", self.pre_activations(pattern, x))
        dense = self._hooked("features", self.activate(pre)).flatten(0, 1)
        rows, features = dense.detach().nonzero(as_tuple=True)
        offsets = torch.searchsorted(rows, torch.arange(dense.shape[0], device=rows.device))
        return self._track(SparseFeatures(dense[rows, features], features, offsets))

    @contextmanager
    def hooks(self, **functions: Callable[[Tensor], Tensor | None]) -> Iterator[Lorsa]:
        """Call functions on intermediate results inside the block, also while attached to a model.

        A function takes the tensor, and may return another to go on with. ``q``: (batch, n_qk_heads, n_queries, d_qk),
        ``k``: the same for all positions, both rotated; ``pattern``: (batch, n_qk_heads, n_queries, n_keys);
        ``pre_activations`` and ``features``: (batch, n_queries, n_ov_heads), dense.
        """
        unknown = sorted(set(functions) - set(HOOKS))
        if unknown:
            raise ValueError(f"Lorsa has no hook {unknown}; its hooks are {HOOKS}")
        try:
            for name, function in functions.items():
                self._hooks[name].append(function)
            yield self
        finally:
            for name, function in functions.items():
                self._hooks[name].remove(function)

    def _hooked(self, name: str, value: Tensor) -> Tensor:
        for function in self._hooks[name]:
            result = function(value)
            value = value if result is None else result
        return value

    def load_weights_(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Take all weights and buffers, as ``state_dict`` names them, from tensors that were read from ``path``.

        Raises:
            ValueError: for tensors that are missing, unknown, of another shape than the config says, or not finite.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != expected:
            names = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
            described = "; ".join(f"{name}: {shapes.get(name)} instead of {expected.get(name)}" for name in names)
            raise ValueError(f"{path} does not fit its config: {described}")
        not_finite = sorted(name for name, tensor in tensors.items() if not all_finite([tensor]))
        if not_finite:
            raise ValueError(f"{path} holds numbers that are not finite in {not_finite}: take an earlier copy of it")
        self.load_state_dict(tensors)

    def with_config(self, **changes: Any) -> Lorsa:
        """The same weights under another k, activation or number of skipped positions."""
        other = Lorsa(replace(self.cfg, **changes)).to(self.W_V.device, self.W_V.dtype)
        other.load_state_dict(self.state_dict())
        other.provenance = dict(self.provenance)
        return other.train(self.training)


@torch.no_grad()
def check_exact(model: AttentionModel, target: AttentionTarget, n_ctx: int | None = None) -> None:
    """Raise ValueError unless the layer's own rank-one components, as a Lorsa, reproduce it on random tokens.

    A window that is one position too long changes one of many weights, too little for a comparison of outputs: how far
    the layer reads is measured apart, on contexts one longer than any window that the model's configuration names.

    Args:
        model: a HookedTransformer or TransformerBridge.
        target: what ``read_attention`` returned.
        n_ctx: longest context that the Lorsa will see; that of the model when None. A window beyond it plays no role.
    """
    longest = min(target.settings["n_ctx"], n_ctx or target.settings["n_ctx"])
    generator = torch.Generator().manual_seed(0)
    n_positions = min(longest, _PROBE_POSITIONS)
    tokens = torch.randint(0, int(model.cfg.d_vocab), (1, n_positions), generator=generator)
    x, y = next(attention_activations(model, target.layer, [tokens]))
    _check_window(model, target, longest)
    error = float((Lorsa.exact(target)(x.float()) - y.float()).abs().max() / y.float().abs().max())
    if not error < (_TOLERANCE if y.dtype == torch.float32 else 20 * _TOLERANCE):
        raise ValueError(
            f"layer {target.layer} of {target.model_name} does something that Lorsa does not reproduce: its own "
            f"components give another output (largest difference {error:.2g} of the largest value). Read settings: "
            f"{target.settings}"
        )


def _check_window(model: AttentionModel, target: AttentionTarget, longest: int) -> None:
    """Raise ValueError unless the layer reads as far as its window says, in contexts of up to ``longest`` positions."""
    window = target.settings.get("window")
    windows = [*named_windows(model, target.layer), *([] if window is None else [window])]
    within = [size + 1 for size in windows if size < longest]
    n_positions = max([min(longest, _PROBE_POSITIONS), *within])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, int(model.cfg.d_vocab), (1, n_positions), generator=generator)
    reach = measured_reach(model, target.layer, tokens)
    if reach != min(window or n_positions, n_positions):
        raise ValueError(
            f"layer {target.layer} of {target.model_name} does something that Lorsa does not reproduce: "
            f"window={window} was read, but it attends to {reach} positions in a context of {n_positions}: choose "
            "another layer or model"
        )
