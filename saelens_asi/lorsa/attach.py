"""Put a Lorsa into a model in place of an attention layer, for the time of a ``with`` block."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from saelens_asi.activations.hooks import logits_at
from saelens_asi.activations.replacement import Logits, prediction_losses
from saelens_asi.evaluation.metrics import SAELossRecovered
from saelens_asi.lorsa.attention import AttentionModel, attention_module, is_bridge
from saelens_asi.lorsa.model import Lorsa

Model = TypeVar("Model", bound=AttentionModel)

# (input of all positions, output of the layer at the new ones, where these may attend or None) -> new output
Replacement = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Where the key-value cache stands in the call of an attention: HookedTransformer's name, then those that transformers
# has used. Newer versions say "cache".
_CACHE_ARGUMENTS = ("past_kv_cache_entry", "past_key_values", "layer_past", "cache")


@contextmanager
def attached(lorsa: Lorsa, model: Model, layer: int) -> Iterator[Model]:
    """Inside the block, the attention output of ``layer`` is the Lorsa's.

    It holds in forward passes, generation with and without a key-value cache, ``run_with_hooks`` and
    ``run_with_cache`` (hook_attn_out shows the Lorsa's output), for a HookedTransformer and a TransformerBridge. The
    layer's own attention still runs, so its hooks show what it would have done. The first ``skip_positions`` positions
    keep the layer's output. On exit, also after an error, the model is as before.

    A TransformerBridge of TransformerLens 3.9 ignores the cache that transformers 5.24 hands it under a new name, and
    then generates wrong text with a key-value cache, with a Lorsa and without. Inside the block that is an error:
    generate with ``use_past_kv_cache=False`` there.

    Raises:
        ValueError: for a layer that does not exist, or a Lorsa of another width; in a forward pass, for a key-value
            cache that was filled before the block, or that the layer's own attention does not fill.
    """
    d_model = int(model.cfg.d_model)
    if lorsa.cfg.d_model != d_model:
        raise ValueError(f"this Lorsa has d_model={lorsa.cfg.d_model}, but the model has {d_model}")
    device = next(iter(model.parameters())).device
    if device != lorsa.W_V.device:
        raise ValueError(f"this Lorsa is on {lorsa.W_V.device}, but the model is on {device}: move it with lorsa.to")

    def output(x: Tensor, own: Tensor, allowed: Tensor | None) -> Tensor:
        n_new = own.shape[1]
        y = lorsa(x.to(lorsa.W_V.dtype), None if n_new == x.shape[1] else n_new, allowed).to(own.dtype)
        place = torch.arange(x.shape[1] - n_new, x.shape[1], device=own.device)
        if allowed is not None:  # padding on the left does not count
            if lorsa.cfg.window is not None and lorsa.cfg.skip_positions >= lorsa.cfg.window:
                raise ValueError(
                    f"skip_positions={lorsa.cfg.skip_positions} reaches beyond the window of {lorsa.cfg.window}, where "
                    "the model's mask does not tell padding from text: give a lower skip_positions"
                )
            place = (allowed & (place[:, None] >= torch.arange(x.shape[1], device=own.device))).sum(dim=-1)[:, 0] - 1
        return torch.where((place < lorsa.cfg.skip_positions)[..., None], own, y)

    was_training = lorsa.training
    lorsa.eval()
    try:
        with replaced(model, layer, output):
            yield model
    finally:
        lorsa.train(was_training)


@dataclass
class _Call:
    """The forward pass of the attention that is under way.

    Attributes:
        x: (batch, n_new, d_model) what it reads.
        cache: TransformerLens's entry of a key-value cache, or transformers' cache of all layers, or None.
        offset: positions that the cache held before.
        mask: the model's attention mask, as the attention gets it.
    """

    x: Tensor | None = None
    cache: Any = None
    offset: int = 0
    mask: Tensor | None = None


@contextmanager
def replaced(model: AttentionModel, layer: int, function: Replacement) -> Iterator[None]:
    """Inside the block, the attention output of ``layer`` is what ``function`` makes of its input.

    Args:
        model: a HookedTransformer or TransformerBridge.
        layer: index of the block.
        function: of the input (batch, n_positions, d_model) of all positions, those of the key-value cache included,
            the layer's own output (batch, n_new, d_model) at the last n_new, and where these may attend: bool,
            broadcastable to (batch, 1, n_new, n_positions), or None. Returns the output (batch, n_new, d_model).

    Raises:
        ValueError: as ``attached`` does.
    """
    attention = attention_module(model, layer)
    call = _Call()
    past = _Past()

    def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        cache = next((kwargs[name] for name in _CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
        call.cache, call.offset, call.mask = cache, _cached_positions(cache, module), kwargs.get("attention_mask")
        if not bridge:
            call.x = kwargs["query_input"] if "query_input" in kwargs else args[0]

    def note_input(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        call.x = output

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if call.x is None or call.x.ndim != 3:
            raise ValueError(
                "the attention has separate inputs for queries, keys and values: switch use_split_qkv_input and "
                "use_attn_in off while a Lorsa is attached"
            )
        x = past.extended(call.cache, call.offset, call.x)
        past.filled(call.cache, _cached_positions(call.cache, attention) > call.offset)
        return function(x, output, _allowed(call.mask, output.shape[1], x.shape[1]))

    bridge = is_bridge(attention)
    handles = [attention.register_forward_pre_hook(before, with_kwargs=True)]
    try:
        if bridge:
            handles.append(attention.hook_in.register_forward_hook(note_input))
            handles.append(attention.hook_out.register_forward_hook(after, prepend=True))
        else:
            handles.append(attention.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Past:
    """Inputs of the positions that a key-value cache holds: a Lorsa cannot go on from the layer's keys and values."""

    def __init__(self) -> None:
        self._inputs: dict[int, tuple[weakref.ref[object], Tensor]] = {}
        self._unfilled: dict[int, weakref.ref[object]] = {}

    def extended(self, cache: object | None, offset: int, x: Tensor) -> Tensor:
        """Inputs of all positions, those of ``x`` last."""
        if cache is None:
            return x
        key = id(cache)
        if not offset and key in self._unfilled and self._unfilled[key]() is cache:
            raise ValueError(
                "the layer's own attention does not fill the key-value cache, so that the model ignores what came "
                "before: generate with use_past_kv_cache=False, or install a TransformerLens that fits transformers"
            )
        if offset:
            owner, seen = self._inputs.get(key, (None, x[:, :0]))
            if owner is None or owner() is not cache or seen.shape[1] < offset:
                raise ValueError(
                    f"the key-value cache holds {offset} positions from before the Lorsa was attached: fill the cache "
                    "while it is attached, or pass all tokens at once"
                )
            x = torch.cat([seen[:, :offset].expand(x.shape[0], -1, -1), x], dim=1)
        self._inputs[key] = (weakref.ref(cache, lambda _: self._inputs.pop(key, None)), x.detach())
        return x

    def filled(self, cache: object | None, grown: bool) -> None:
        """Note whether the layer's attention put its keys and values into the cache.

        A cache that stays empty harms nothing in a single forward pass, which may come with one; it does when it comes
        again.
        """
        if cache is not None and not grown:
            key = id(cache)
            self._unfilled[key] = weakref.ref(cache, lambda _: self._unfilled.pop(key, None))
        else:
            self._unfilled.pop(id(cache), None)


def _cached_positions(cache: Any, module: nn.Module) -> int:
    if cache is None:
        return 0
    if hasattr(cache, "past_keys"):
        return int(cache.past_keys.shape[1])
    return int(cache.get_seq_length(getattr(module, "_layer_idx", None) or 0))


def _allowed(mask: Tensor | None, n_new: int, n_positions: int) -> Tensor | None:
    """Bool, broadcastable to (batch, 1, n_new, n_positions), from the model's attention mask; None for none."""
    if mask is None:
        return None
    if mask.is_floating_point():
        mask = mask > -1.0  # additive: 0, or a very negative number
    mask = mask.bool()[..., :n_positions]
    # The cache of a sliding window forgets what lies before it, and the mask tells of the rest alone.
    mask = nn.functional.pad(mask, (n_positions - mask.shape[-1], 0), value=False)
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    return mask if mask.shape[-2] == 1 else mask[..., -n_new:, :]


@torch.no_grad()
def lorsa_loss_recovered(
    model: AttentionModel, lorsa: Lorsa, layer: int, tokens: Tensor, batch_size: int = 8
) -> SAELossRecovered:
    """What putting the Lorsa in does to the model's next-token predictions.

    The skipped positions keep the layer's own output, also in the zero ablation.

    Args:
        model: a HookedTransformer or TransformerBridge.
        lorsa: for that layer.
        layer: index of the block.
        tokens: (n_windows, n_positions) token ids.
        batch_size: windows in one forward pass.
    """

    def zero(x: Tensor, own: Tensor, allowed: Tensor | None) -> Tensor:
        return torch.cat([own[:, : lorsa.cfg.skip_positions], 0 * own[:, lorsa.cfg.skip_positions :]], dim=1)

    def within(context: Callable[[], AbstractContextManager[object]]) -> Logits:
        def logits(batch: Tensor, place: slice, where: Tensor) -> Tensor:
            with context():
                return logits_at(model, batch, where)

        return logits

    changed = {
        "zero": within(lambda: replaced(model, layer, zero)),
        "reconstructed": within(lambda: attached(lorsa, model, layer)),
    }
    losses = prediction_losses(model, tokens, changed, batch_size=batch_size)
    return SAELossRecovered.of(losses, tokens[:, 1:].numel())
