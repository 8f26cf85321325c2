"""An attention layer of a TransformerLens model: its weights and settings, and what it reads and puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

import torch
from torch import Tensor, nn

from saelens_asi.activations.hooks import HookedModel
from saelens_asi.lorsa.config import Llama3Scaling, RotaryPositions


class AttentionModel(HookedModel, Protocol):
    """A HookedTransformer or TransformerBridge, as far as its attention is read."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


class PatternSettings(TypedDict, total=False):
    """Settings of ``LorsaConfig`` that a layer's patterns follow from; what they mean stands there."""

    positions: Literal["rotary", "learned", "none"]
    rotary: RotaryPositions
    attn_scale: float
    soft_cap: float | None
    window: int | None
    qk_norm: bool
    qk_norm_eps: float
    n_ctx: int


_POSITIONS: dict[str, Literal["rotary", "learned", "none"]] = {
    "standard": "learned",
    "rotary": "rotary",
    "none": "none",
}


# What a HookedTransformer's attention is called with.
_INPUTS = ("query_input", "key_input", "value_input")

# Sizes of the impulses that show how far a layer reads, in units of what it reads.
_IMPULSES = (1.0, 3.0, 10.0, 30.0)


def attention_module(model: AttentionModel, layer: int) -> Any:
    """The attention of block ``layer``. Raises ValueError for a layer that does not exist, or has no attention."""
    n_layers = len(model.blocks)
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer={layer} does not exist: this model has layers 0 to {n_layers - 1}")
    attention = getattr(model.blocks[layer], "attn", None)
    if attention is None:
        raise ValueError(f"block {layer} of this model has no attention (it is {type(model.blocks[layer]).__name__})")
    return attention


def is_bridge(attention: Any) -> bool:
    """Whether this is the attention of a TransformerBridge; otherwise it is a HookedTransformer's."""
    return hasattr(attention, "original_component")


@contextmanager
def _captured(
    model: AttentionModel, layer: int, change: Callable[[Tensor], Tensor] = lambda x: x
) -> Iterator[dict[str, Tensor]]:
    """What the attention reads (after ln1) and puts out (before any norm after it) in a forward pass.

    ``change`` makes what it reads of what it would have read.
    """
    attention = attention_module(model, layer)
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: seen.__setitem__(name, output)

    def note_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        args = tuple(change(one) if i < 3 else one for i, one in enumerate(args))  # of queries, keys and values
        kwargs = {name: change(one) if name in _INPUTS else one for name, one in kwargs.items()}
        seen["x"] = kwargs["query_input"] if "query_input" in kwargs else args[0]
        return args, kwargs

    def note_bridge_input(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["x"] = change(output)
        return seen["x"]

    if is_bridge(attention):
        handles = [
            attention.hook_in.register_forward_hook(note_bridge_input),
            attention.hook_out.register_forward_hook(note("y")),
        ]
    else:
        handles = [
            attention.register_forward_pre_hook(note_input, with_kwargs=True),
            attention.register_forward_hook(note("y")),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_activations(
    model: AttentionModel, layer: int, batches: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the attention of ``layer`` reads and puts out on batches of token ids (n, n_positions).

    Yields:
        (x, y), each (n, n_positions, d_model): the input after ln1, and attn_out before any norm that follows it.
    """
    device = next(iter(model.parameters())).device
    for tokens in batches:
        with _captured(model, layer) as seen:
            model(tokens.to(device), return_type=None, stop_at_layer=layer + 1)
        yield seen["x"].detach(), seen["y"].detach()


@torch.no_grad()
def measured_reach(model: AttentionModel, layer: int, tokens: Tensor) -> int:
    """How many positions of (1, n_positions) token ids read the first: its window, or all of them.

    What the attention reads at the first position is changed, and nothing else; the output stays as it was, to the bit,
    where that is masked. Several impulses, since a single one may draw too little attention from where it is seen.
    """
    device = next(iter(model.parameters())).device
    generator = torch.Generator().manual_seed(0)

    def output(impulse: float) -> Tensor:
        def change(x: Tensor) -> Tensor:
            direction = torch.randn(x.shape[-1], generator=generator).to(x) * x.float().square().mean().sqrt().to(x)
            return torch.cat([x[:, :1] + impulse * direction, x[:, 1:]], dim=1) if impulse else x

        with _captured(model, layer, change) as seen:
            model(tokens.to(device), return_type=None, stop_at_layer=layer + 1)
        return seen["y"]

    plain = output(0.0)
    changed = torch.stack([(output(impulse) != plain).any(dim=-1)[0] for impulse in _IMPULSES]).any(dim=0)
    return int(changed.nonzero().max()) + 1 if changed.any() else 0


def named_windows(model: AttentionModel, layer: int) -> list[int]:
    """Every size of a window that the model's configuration names, whichever layers they are for."""
    configs = [model.cfg, getattr(getattr(attention_module(model, layer), "original_component", None), "config", None)]
    values = [getattr(config, name, None) for config in configs for name in _WINDOW_SETTINGS]
    return [int(value) for value in values if isinstance(value, int) and value > 0]


_WINDOW_SETTINGS = ("window_size", "sliding_window", "attention_chunk_size")

_NOT_LORSA = "which Lorsa does not reproduce: choose another layer or model"


@dataclass(frozen=True)
class AttentionTarget:
    """Float32 weights and settings of one attention layer; keys and values are repeated to one for each query head.

    Attributes:
        W_Q, W_K, W_V: (n_heads, d_model, d_head).
        b_Q, b_K, b_V: (n_heads, d_head).
        W_O: (n_heads, d_head, d_model).
        b_O: (d_model,).
        q_norm, k_norm: (d_head,) scales of the QK-norm, or None.
        settings: what ``LorsaConfig`` needs for the same patterns: positions, scale, soft cap, window, QK-norm, n_ctx.
        n_key_value_heads: of the layer itself.
        model_name: for provenance.
        layer: index of the block.
    """

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    b_Q: Tensor
    b_K: Tensor
    b_V: Tensor
    b_O: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    settings: PatternSettings
    n_key_value_heads: int
    model_name: str
    layer: int

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.W_Q.shape[0]

    @property
    def d_model(self) -> int:
        """Width of what the layer reads and writes."""
        return self.W_Q.shape[1]

    @property
    def d_head(self) -> int:
        """Width of queries, keys and values of a head."""
        return self.W_Q.shape[2]


def read_attention(model: AttentionModel, layer: int) -> AttentionTarget:
    """Weights and settings of an attention layer of a HookedTransformer or a TransformerBridge.

    Raises:
        ValueError: where the layer does something that a Lorsa has no counterpart for.
    """
    attention, cfg = attention_module(model, layer), model.cfg
    kind = str(getattr(cfg, "positional_embedding_type", "standard"))
    if kind not in _POSITIONS:
        raise ValueError(f"layer {layer} has {kind!r} positions, {_NOT_LORSA}")
    if getattr(cfg, "attention_dir", "causal") != "causal":
        raise ValueError(f"layer {layer} attends in both directions, {_NOT_LORSA}")
    try:
        W_Q, W_K, W_V, W_O = (getattr(attention, name).detach().float() for name in ("W_Q", "W_K", "W_V", "W_O"))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"layer {layer} has no separate query, key, value and output weights, {_NOT_LORSA}") from error
    if W_Q.ndim != 3:
        raise ValueError(f"layer {layer} holds its weights in a packed form: load the model without quantization")
    n_heads, _, d_head = W_Q.shape
    bridge = is_bridge(attention)
    settings, q_norm, k_norm = _bridge_settings(attention, cfg) if bridge else _hooked_settings(attention, cfg)
    settings["positions"] = _POSITIONS[kind]
    settings["n_ctx"] = int(cfg.n_ctx)
    zeros = W_Q.new_zeros(n_heads, d_head)
    biases = [_bias(attention, name) for name in ("b_Q", "b_K", "b_V")]
    b_O = _bias(attention, "b_O")
    return AttentionTarget(
        W_Q=W_Q,
        W_K=_per_query_head(W_K, n_heads),
        W_V=_per_query_head(W_V, n_heads),
        W_O=W_O,
        b_Q=zeros if biases[0] is None else biases[0],
        b_K=zeros if biases[1] is None else _per_query_head(biases[1], n_heads),
        b_V=zeros if biases[2] is None else _per_query_head(biases[2], n_heads),
        b_O=W_O.new_zeros(W_O.shape[-1]) if b_O is None else b_O,
        q_norm=q_norm,
        k_norm=k_norm,
        settings=settings,
        n_key_value_heads=int(getattr(cfg, "n_key_value_heads", None) or n_heads),
        model_name=str(getattr(cfg, "model_name", type(model).__name__)),
        layer=layer,
    )


def _per_query_head(weight: Tensor, n_heads: int) -> Tensor:
    # Grouped queries (arXiv 2305.13245): a bridge gives one weight a group, a HookedTransformer one a query head.
    return weight if weight.shape[0] == n_heads else weight.repeat_interleave(n_heads // weight.shape[0], dim=0)


def _bias(attention: Any, name: str) -> Tensor | None:
    try:
        bias = getattr(attention, name)
    except AttributeError:  # a bridge raises where its linear layer has none
        return None
    return None if bias is None else bias.detach().float()


def _refuse(layer: int | None, features: Mapping[str, bool]) -> None:
    for name, present in features.items():
        if present:
            raise ValueError(f"layer {layer} has {name}, {_NOT_LORSA}")


def _hooked_settings(attention: Any, cfg: Any) -> tuple[PatternSettings, Tensor | None, Tensor | None]:
    _refuse(
        attention.layer_id,
        {
            "attention sinks": getattr(cfg, "use_attention_sinks", False),
            "clipped queries and keys": getattr(cfg, "clip_qkv", None) is not None,
            "log-n query scaling": getattr(cfg, "use_logn_attn", False),
            "YaRN positions": getattr(cfg, "use_yarn_rope", False),
            "dynamic NTK positions": getattr(cfg, "use_dynamic_ntk_rope", False),
            "split query, key and value inputs": cfg.use_split_qkv_input or cfg.use_attn_in,
            "a QK-norm across heads": attention.q_norm is not None and not cfg.use_qk_norm,
        },
    )
    local = attention.attn_type == "local"
    settings: PatternSettings = {
        "attn_scale": float(attention.attn_scale),
        "soft_cap": cfg.attn_scores_soft_cap if cfg.attn_scores_soft_cap > 0 else None,
        "window": int(cfg.window_size) if local else None,
        "qk_norm": attention.q_norm is not None,
    }
    if cfg.positional_embedding_type == "rotary":
        scaling = None
        if cfg.use_NTK_by_parts_rope:
            scaling = Llama3Scaling(
                factor=cfg.NTK_by_parts_factor,
                low_freq_factor=cfg.NTK_by_parts_low_freq_factor,
                high_freq_factor=cfg.NTK_by_parts_high_freq_factor,
                original_context=cfg.NTK_original_ctx_len,
            )
        local_base = getattr(cfg, "rotary_base_local", None)
        settings["rotary"] = RotaryPositions(
            dim=cfg.rotary_dim,
            base=float(local_base if local and local_base is not None else cfg.rotary_base),
            adjacent_pairs=bool(cfg.rotary_adjacent_pairs),
            linear_factor=1.0 if local else float(getattr(cfg, "rotary_scaling_factor", 1.0)),
            llama3=scaling,
        )
    return _with_qk_norm(settings, attention, cfg)


def _bridge_settings(attention: Any, cfg: Any) -> tuple[PatternSettings, Tensor | None, Tensor | None]:
    hf = attention.original_component
    hf_cfg = getattr(hf, "config", None)
    layer = getattr(attention, "_layer_idx", None)
    submodules = getattr(attention, "submodules", {})
    _refuse(
        layer,
        {
            "attention sinks": getattr(hf, "sinks", None) is not None,
            "clipped queries and keys": getattr(hf_cfg, "clip_qkv", None) is not None,
            "a gate on its output": "gate" in submodules or getattr(cfg, "gated_q_proj", False),
            "scaled keys": getattr(hf, "key_multiplier", None) is not None,
            "split query, key and value inputs": getattr(cfg, "use_split_qkv_input", False)
            or getattr(cfg, "use_attn_in", False),
            "a QK-norm across heads": getattr(attention, "_qk_norm_phase", None) == "pre_reshape",
        },
    )
    scaling = getattr(hf, "scaling", None)
    scale = cfg.d_head**0.5 if scaling is None else 1 / scaling
    if scaling is None and getattr(cfg, "scale_attn_by_inverse_layer_idx", False) and layer is not None:
        scale *= layer + 1
    window = getattr(hf, "sliding_window", None)
    if not hasattr(hf, "sliding_window") and getattr(hf_cfg, "use_sliding_window", True):  # Mistral: in its config only
        window = getattr(hf_cfg, "sliding_window", None)
    if getattr(hf, "attention_type", None) == "local":  # GPT-Neo
        window = getattr(hf_cfg, "window_size", None)
    soft_cap = getattr(hf, "attn_logit_softcapping", None)
    settings: PatternSettings = {
        "attn_scale": float(scale),
        "soft_cap": None if soft_cap is None else float(soft_cap),
        "window": None if window is None else int(window),
        "qk_norm": "q_norm" in submodules,
    }
    if cfg.positional_embedding_type == "rotary":
        settings["rotary"] = _hf_rotary(hf, hf_cfg, cfg, layer)
    return _with_qk_norm(settings, attention, cfg)


def _hf_rotary(hf: Any, hf_cfg: Any, cfg: Any, layer: int | None) -> RotaryPositions:
    """Rotary settings of a transformers attention, from its configuration."""
    rope = getattr(hf_cfg, "rope_parameters", None) or getattr(hf_cfg, "rope_scaling", None) or {}
    by_type = rope.get(getattr(hf, "layer_type", None) or "full_attention")
    rope = dict(by_type if isinstance(by_type, dict) else rope)
    kind = rope.get("rope_type", rope.get("type", "default")) or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"layer {layer} has rotary positions of type {kind!r}, {_NOT_LORSA}")
    share = rope.get("partial_rotary_factor") or getattr(hf_cfg, "partial_rotary_factor", None)
    share = share or getattr(hf_cfg, "rotary_pct", None) or 1.0
    scaling = None
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_context=rope["original_max_position_embeddings"],
        )
    base: Any = rope.get("rope_theta") or getattr(hf_cfg, "rope_theta", None) or getattr(cfg, "rotary_base", 10_000)
    return RotaryPositions(
        dim=int(getattr(hf_cfg, "rotary_dim", None) or int(cfg.d_head * share)),
        base=float(base),
        adjacent_pairs=bool(getattr(cfg, "rotary_adjacent_pairs", False)),
        linear_factor=float(rope.get("factor", 1.0)) if kind == "linear" else 1.0,
        llama3=scaling,
    )


@torch.no_grad()
def _with_qk_norm(
    settings: PatternSettings, attention: Any, cfg: Any
) -> tuple[PatternSettings, Tensor | None, Tensor | None]:
    if not settings["qk_norm"]:
        return settings, None, None
    norm = getattr(attention.q_norm, "original_component", attention.q_norm)
    eps = next((getattr(norm, n) for n in ("variance_epsilon", "eps") if hasattr(norm, n)), getattr(cfg, "eps", 1e-6))
    settings["qk_norm_eps"] = float(eps)
    ones = attention.W_Q.new_ones(1, cfg.d_head)  # has root mean square 1: comes out as the norm's scale
    scales = []
    for module in (attention.q_norm, attention.k_norm):
        module = getattr(module, "original_component", module)
        scales.append((module(ones) * (1 + float(eps)) ** 0.5).flatten().detach().float())
    return settings, scales[0], scales[1]
