"""What an attention layer reads and puts out, in a TransformerLens model of either kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def attention_module(model: Any, layer: int) -> Any:
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
def _captured(model: Any, layer: int) -> Iterator[dict[str, Tensor]]:
    """What the attention reads (after ln1) and puts out (before any norm after it) in a forward pass."""
    attention = attention_module(model, layer)
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output)

    def note_input(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["x"] = kwargs["query_input"] if "query_input" in kwargs else args[0]

    if is_bridge(attention):
        handles = [
            attention.hook_in.register_forward_hook(note("x")),
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
def attention_activations(model: Any, layer: int, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """What the attention of ``layer`` reads and puts out on batches of token ids (n, n_positions).

    Yields:
        (x, y), each (n, n_positions, d_model): the input after ln1, and attn_out before any norm that follows it.
    """
    device = next(iter(model.parameters())).device
    for tokens in batches:
        with _captured(model, layer) as seen:
            model(tokens.to(device), return_type=None, stop_at_layer=layer + 1)
        yield seen["x"].detach(), seen["y"].detach()
